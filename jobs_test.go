package aegis_test

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
)

func send[T, R any](tb testing.TB, s *aegis.Service, service, command string, data T, opts ...aegis.CallOption) *aegis.Job[R] {
	tb.Helper()
	j, err := aegis.SendCommand[T, R](context.Background(), s, service, command, data, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	return j
}

// updates waits until a job ends, and returns all its updates.
func updates[R any](tb testing.TB, j *aegis.Job[R]) (all []aegis.Progress) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for p, err := range j.Updates(ctx) {
		if err != nil {
			tb.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func wait[R any](tb testing.TB, j *aegis.Job[R]) R {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := j.Wait(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func waitError[R any](tb testing.TB, j *aegis.Job[R]) error {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := j.Wait(ctx)
	if err == nil {
		tb.Fatalf("got %v, want an error", r)
	}
	return err
}

func TestCommandRunsOncePerIdempotencyKey(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	var runs atomic.Int32
	var instances []*aegis.Service
	for range 3 {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int32, error) {
			time.Sleep(20 * time.Millisecond) // so that other senders come while it runs
			return runs.Add(1), nil
		})
		start(t, svc)
		instances = append(instances, svc)
	}
	var senders []*process
	for range 4 {
		senders = append(senders, startProcess(t, "senders", srv))
	}
	for _, p := range senders {
		if line, _ := p.line(t); line != "ready" {
			t.Fatal(line)
		}
	}
	for _, p := range senders { // all send at once
		if _, err := io.WriteString(p.input, "go\n"); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range senders {
		for range 25 {
			if line, _ := p.line(t); line != "1 <nil>" {
				t.Errorf("got %s", line)
			}
		}
	}
	_, err := aegis.SendCommand[int, int32](t.Context(), newService(t, srv, "shop"), "risk", "work", 8, aegis.IdempotencyKey("seven"))
	if e := fails(t, err, aegis.ErrInvalid, "seven"); !e.NotRun {
		t.Error("NotRun is not set")
	}
	for _, s := range instances {
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	srv = startServer(t, samePort, store)
	if r := wait(t, send[int, int32](t, newService(t, srv, "shop"), "risk", "work", 7, aegis.IdempotencyKey("seven"))); r != 1 || runs.Load() != 1 {
		t.Errorf("got %d after %d runs", r, runs.Load())
	}
}

func TestCancelCommand(t *testing.T) { // not parallel, because it measures how long a cancel takes
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var started journal[string]
	ended := make(chan time.Time, 1)
	handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[string]) (int, error) {
		started.add(c.Data)
		if c.Data == "quick" {
			return 1, nil
		}
		for ctx.Err() == nil { // reports progress more often than it is written
			_ = c.Progress(1, "")
			time.Sleep(time.Millisecond)
		}
		ended <- time.Now()
		if c.Data == "stubborn" {
			return 2, nil
		}
		return 0, ctx.Err()
	}, aegis.Concurrency(1))
	start(t, svc)
	for _, data := range []string{"heeds", "stubborn"} {
		running := send[string, int](t, client, "risk", "work", data)
		eventually(t, "the command runs", func() bool { return slices.Contains(started.all(), data) })
		waiting := send[string, int](t, client, "risk", "work", "waits behind "+data)
		if err := waiting.Cancel(t.Context()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := running.Cancel(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := (<-ended).Sub(begin); took > 100*time.Millisecond {
			t.Errorf("the handler of %q ended %v after the cancel", data, took)
		}
		for _, j := range []*aegis.Job[int]{running, waiting} {
			fails(t, waitError(t, j), aegis.ErrCanceled, j.ID)
			if all := updates(t, j); all[len(all)-1].State != "canceled" {
				t.Errorf("got %+v", all)
			}
			if err := j.Cancel(t.Context()); err != nil { // a second cancel is no error
				t.Error(err)
			}
		}
	}
	quick := send[string, int](t, client, "risk", "work", "quick")
	if n := wait(t, quick); n != 1 {
		t.Errorf("a later command got %d", n)
	}
	fails(t, quick.Cancel(t.Context()), aegis.ErrInvalid, "completed")
	if got := started.all(); !slices.Equal(got, []string{"heeds", "stubborn", "quick"}) {
		t.Errorf("got runs of %q", got)
	}
	if letters := deadLetters(t, svc); len(letters) > 0 {
		t.Errorf("got dead letters %+v", letters)
	}
}

func TestAttach(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	release := make(chan struct{})
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		if err := c.Progress(40, "so far"); err != nil {
			return "", err
		}
		<-release
		return "done", nil
	})
	unknown := aegis.Attach[string](client, "risk", "work", "nothing")
	fails(t, waitError(t, unknown), aegis.ErrNotFound, "nothing")
	start(t, svc)
	fails(t, waitError(t, unknown), aegis.ErrNotFound, "nothing")
	for _, err := range unknown.Updates(t.Context()) {
		fails(t, err, aegis.ErrNotFound)
	}
	fails(t, unknown.Cancel(t.Context()), aegis.ErrNotFound)

	send[string, string](t, client, "risk", "work", "x", aegis.IdempotencyKey("one"))
	if err := client.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	j := aegis.Attach[string](newService(t, srv, "shop"), "risk", "work", "one")
	var states []string
	for p, err := range j.Updates(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, p.State)
		if p.Percent == 40 && p.State == "running" {
			close(release)
		}
	}
	if states[len(states)-1] != "completed" || !slices.Contains(states, "running") {
		t.Errorf("got %q", states)
	}
	if r := wait(t, j); r != "done" {
		t.Errorf("got %q", r)
	}
	for p, err := range j.Updates(t.Context()) { // now the final state comes at once
		if err != nil || p.State != "completed" || p.Message != "so far" {
			t.Errorf("got %+v, %v", p, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := j.Wait(ctx)
	fails(t, err, aegis.ErrCanceled)
}

func TestInvalidCommandArguments(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	ctx := t.Context()
	_, err := aegis.SendCommand[int, int](ctx, svc, "no service", "work", 1)
	fails(t, err, aegis.ErrInvalid, "no service")
	_, err = aegis.SendCommand[int, int](ctx, svc, "risk", "no-command", 1)
	fails(t, err, aegis.ErrInvalid, "no-command")
	_, err = aegis.SendCommand[int, int](ctx, svc, "risk", "work", 1, aegis.AtPriority(4))
	fails(t, err, aegis.ErrInvalid, "AtPriority(4)")
	_, err = aegis.SendCommand[int, int](ctx, svc, "risk", "work", 1, aegis.EventVersion("1.0"))
	fails(t, err, aegis.ErrInvalid, "EventVersion")
	_, err = aegis.SendCommand[chan int, int](ctx, svc, "risk", "work", make(chan int))
	fails(t, err, aegis.ErrInvalid, "risk.work")
	_, err = aegis.SendCommand[[]byte, int](ctx, svc, "risk", "work", make([]byte, 1<<20))
	fails(t, err, aegis.ErrInvalid, "max_payload")
	fails(t, aegis.Publish(ctx, svc, "a", "b", 1, aegis.AtPriority(aegis.High)), aegis.ErrInvalid, "AtPriority")
	noop := func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil }
	handleCommand(t, svc, "work", noop)
	start(t, svc) // before the failures below, which would make it fail
	fails(t, aegis.HandleCommand(svc, "no-command", noop), aegis.ErrInvalid, "no-command")
	fails(t, aegis.HandleCommand[int, int](svc, "work", nil), aegis.ErrInvalid, "nil")
	fails(t, aegis.HandleCommand(svc, "work", noop, aegis.Broadcast()), aegis.ErrInvalid, "Broadcast")
	fails(t, aegis.HandleCommand(svc, "work", noop), aegis.ErrInvalid, "commands.risk.work")
	other := newService(t, srv, "shop")
	_, err = aegis.SendCommand[int, int](ctx, other, "risk", "other", 1)
	if e := fails(t, err, aegis.ErrUnimplemented, "risk", "other"); !e.NotRun {
		t.Error("NotRun is not set")
	}
	if err := svc.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	_, err = aegis.SendCommand[int, int](ctx, svc, "risk", "work", 1)
	fails(t, err, aegis.ErrClosed)
	j := send[int, int](t, other, "risk", "work", 1) // it is queued, because no instance runs
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, err = j.Wait(short)
	fails(t, err, aegis.ErrTimeout)
	_, err = aegis.SendCommand[int, int](ctx, newService(t, startServer(t), "shop"), "risk", "work", 1)
	fails(t, err, aegis.ErrUnavailable, "JetStream")
}

// If a command without an idempotency key can't be queued, nobody can send it again. So its record must expire.
func TestRecordOfUnsentCommandExpires(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
	start(t, svc)
	limitMessages(t, srv, "AEGIS_COMMANDS", 1)
	_, err := aegis.SendCommand[int, int](t.Context(), client, "risk", "work", 1)
	if e := fails(t, err, aegis.ErrInvalid); !e.NotRun {
		t.Error("NotRun is not set")
	}
	st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_commands")
	if err != nil {
		t.Fatal(err)
	}
	m, err := st.GetLastMsgForSubject(t.Context(), "$KV.aegis_commands.risk.work.>")
	if err != nil || m.Header.Get("Nats-TTL") == "" {
		t.Errorf("the record does not expire: %v, %v", m, err)
	}
}

// Senders with the same idempotency key and the same data share one command, whatever their codecs and the order of their fields.
func TestIdempotencyKeyMatchesAcrossEncodings(t *testing.T) {
	t.Parallel()
	type order struct {
		SKU    string
		Amount int64
		Limits map[string]float64
	}
	type reordered struct {
		Limits map[string]float64
		Amount int64
		SKU    string
	}
	srv := startServer(t, withJetStream(t))
	svc, other := newService(t, srv, "risk"), newService(t, srv, "shop", aegis.WithCodec(aegis.JSON))
	var runs atomic.Int32
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[order]) (int64, error) {
		runs.Add(1)
		return c.Data.Amount, nil
	})
	start(t, svc)
	const amount = 1<<62 + 1
	limits := map[string]float64{"a": 0.5, "b": 1, "c": 1e9}
	key := aegis.IdempotencyKey("k")
	send := func(s *aegis.Service, data any) (*aegis.Job[int64], error) {
		return aegis.SendCommand[any, int64](t.Context(), s, "risk", "work", data, key)
	}
	for _, s := range []*aegis.Service{svc, other} {
		for _, data := range []any{order{"x", amount, limits}, reordered{limits, amount, "x"}} {
			job, err := send(s, data)
			if err != nil {
				t.Fatalf("%T: %v", data, err)
			}
			if n, err := job.Wait(t.Context()); n != amount || err != nil {
				t.Errorf("%T: got %d, %v", data, n, err)
			}
		}
		_, err := send(s, order{"x", amount + 1, limits})
		fails(t, err, aegis.ErrInvalid, "other data")
	}
	if n := runs.Load(); n != 1 {
		t.Errorf("got %d runs, want 1", n)
	}
}

// A handler that was just added may not be in its sender's copy of the registry yet.
func TestCommandForHandlerThatWasJustAdded(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handleCommand(t, svc, "first", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data, nil })
	start(t, svc)
	wait(t, send[int, int](t, client, "svc", "first", 1)) // makes the copy
	for n := range 10 {
		name := fmt.Sprint("command", n)
		handleCommand(t, svc, name, func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data, nil })
		if got := wait(t, send[int, int](t, client, "svc", name, n)); got != n {
			t.Errorf("got %d, want %d", got, n)
		}
	}
	_, err := aegis.SendCommand[int, int](t.Context(), client, "svc", "unknown", 1)
	fails(t, err, aegis.ErrUnimplemented, "unknown")
}

// Jobs that are followed spread over the connections of the pool.
func TestFollowedJobsUseAllConnections(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	release := make(chan struct{})
	handleCommand(t, svc, "run", func(context.Context, *aegis.Command[int]) (int, error) { <-release; return 0, nil })
	start(t, svc)
	followed := func() (perConn []int) {
		conns, err := srv.Connz(&server.ConnzOptions{Subscriptions: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range conns.Conns {
			n := 0
			for _, subject := range c.Subs {
				if strings.HasPrefix(subject, "aegis.jobs.") {
					n++
				}
			}
			if n > 0 {
				perConn = append(perConn, n)
			}
		}
		return perConn
	}
	var all sync.WaitGroup
	for n := range 10 {
		job := send[int, int](t, client, "svc", "run", n)
		all.Go(func() { wait(t, job) })
		eventually(t, "the job is followed", func() bool {
			sum := 0
			for _, k := range followed() {
				sum += k
			}
			return sum == n+1
		})
	}
	if got := followed(); len(got) != 2 || min(got[0], got[1]) < 3 {
		t.Errorf("the connections follow %v jobs, want about as many each", got)
	}
	close(release)
	all.Wait()
}

// Equal data joins, whatever the order in which a codec writes its parts. Data that JSON can't express is not compared.
func TestIdempotencyKeyWithUnorderedData(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	book := map[int64]float64{}
	for i := range int64(20) {
		book[i*1000] = float64(i) / 3
	}
	again := func(data any, n int) error {
		key := aegis.IdempotencyKey(strings.ReplaceAll(fmt.Sprintf("%T", data), " ", ""))
		for range n {
			if _, err := aegis.SendCommand[any, int](t.Context(), svc, "nobody", "work", data, key); err != nil {
				return err
			}
		}
		return nil
	}
	for _, data := range []any{book, map[bool]int{true: 1, false: 2}, []any{book, map[string]any{"b": 1.5, "a": book}}, time.Now(), math.NaN(), &book} {
		if err := again(data, 20); err != nil {
			t.Errorf("%T: %v", data, err)
		}
	}
	book[0] = 1
	fails(t, again(book, 1), aegis.ErrInvalid, "other data")
}

// A zero Raw is an empty payload, also as the data of a command.
func TestCommandWithZeroRaw(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	if _, err := aegis.SendCommand[aegis.Raw, int](t.Context(), svc, "nobody", "work", aegis.Raw{}); err != nil {
		t.Error(err)
	}
}
