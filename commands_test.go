package aegis_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func handleCommand[T, R any](tb testing.TB, s *aegis.Service, command string, fn func(context.Context, *aegis.Command[T]) (R, error), opts ...aegis.HandlerOption) {
	tb.Helper()
	if err := aegis.HandleCommand(s, command, fn, opts...); err != nil {
		tb.Fatal(err)
	}
}

func TestCommand(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
		t.Run(codec.ContentType(), func(t *testing.T) {
			name := "risk-" + strings.TrimPrefix(codec.ContentType(), "application/")
			svc, client := newService(t, srv, name, aegis.WithCodec(codec)), newService(t, srv, "shop", aegis.WithCodec(codec))
			reported := make(chan struct{})
			var got aegis.Command[Order]
			handleCommand(t, svc, "rebalance", func(ctx context.Context, c *aegis.Command[Order]) (Receipt, error) {
				got = *c
				if err := c.Progress(25, "a quarter"); err != nil {
					t.Error(err)
				}
				<-reported
				for i := range 1000 { // faster than progress is written
					if err := c.Progress(25+float64(i)/1000, "more"); err != nil {
						t.Error(err)
					}
				}
				if err := c.Progress(99, "nearly"); err != nil {
					t.Error(err)
				}
				fails(t, c.Progress(101, ""), aegis.ErrInvalid, "101")
				return Receipt{ID: c.Data.SKU + "-" + aegis.CorrelationID(ctx)}, nil
			})
			handleCommand(t, svc, "count", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data + 1, nil })
			start(t, svc)
			j := send[Order, Receipt](t, client, name, "rebalance", Order{SKU: "x"}, aegis.IdempotencyKey("k.1/"+name), aegis.AtPriority(aegis.High))
			var states []string
			for p, err := range j.Updates(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				states = append(states, fmt.Sprint(p.State, " ", p.Percent, " ", p.Message, " ", p.Attempt))
				if p.Percent == 25 {
					close(reported)
				}
			}
			if n := len(states); n < 2 || n > 12 || states[n-1] != "completed 100 nearly 1" || !slices.Contains(states, "running 25 a quarter 1") {
				t.Errorf("got %q", states)
			}
			if r := wait(t, j); r.ID != "x-k.1/"+name {
				t.Errorf("got %+v", r)
			}
			if got.ID != "k.1/"+name || got.Source != "shop" || got.Priority != aegis.High || got.Attempt != 1 || got.Fence == 0 || got.Data.SKU != "x" {
				t.Errorf("got %+v", got)
			}
			other := newService(t, srv, "ops", aegis.WithCodec(codec))
			if r := wait(t, aegis.Attach[Receipt](other, name, "rebalance", j.ID)); r.ID != "x-"+j.ID {
				t.Errorf("another service that attached got %+v", r)
			}
			for n := range 130 {
				if r := wait(t, send[int, int](t, client, name, "count", n)); r != n+1 {
					t.Fatalf("got %d, want %d", r, n+1)
				}
			}
		})
	}
}

func TestCommandFails(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t), func(o *server.Options) { o.MaxPayload = 64 << 10 })
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var attempts journal[string]
	var fixed atomic.Bool
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) ([]byte, error) {
		attempts.add(fmt.Sprint(c.Data, " ", c.Attempt))
		switch {
		case c.Data == "panic":
			panic("ouch")
		case c.Data == "large":
			return make([]byte, 64<<10), nil
		case c.Data == "once" && c.Attempt == 1, c.Data == "never" && !fixed.Load():
			return nil, &aegis.Error{Code: "NO_LIMIT", Message: "no limit set"}
		}
		return []byte(c.Data), nil
	}, aegis.Attempts(2), aegis.Backoff(time.Millisecond, time.Millisecond))
	start(t, svc)

	if r := wait(t, send[string, []byte](t, client, "risk", "work", "once")); string(r) != "once" {
		t.Errorf("got %q", r)
	}
	never := send[string, []byte](t, client, "risk", "work", "never", aegis.IdempotencyKey("never"))
	if e := fails(t, waitError(t, never), &aegis.Error{Code: "NO_LIMIT"}, "no limit set"); e.Source != "risk" {
		t.Errorf("got %+v", e)
	}
	all := updates(t, never)
	if last := all[len(all)-1]; last.State != "failed" || last.Attempt != 2 {
		t.Errorf("got %+v", all)
	}
	fails(t, waitError(t, send[string, []byte](t, client, "risk", "work", "panic")), aegis.ErrInternal, "ouch")
	fails(t, waitError(t, send[string, []byte](t, client, "risk", "work", "large")), aegis.ErrInternal, "max_payload")
	fails(t, waitError(t, send[[]int, []byte](t, client, "risk", "work", []int{1})), aegis.ErrInvalid, "string")
	want := []string{"once 1", "once 2", "never 1", "never 2", "panic 1", "panic 2", "large 1"}
	if got := attempts.all(); !slices.Equal(got, want) {
		t.Errorf("got attempts %q", got)
	}
	letters := deadLetters(t, svc)
	if len(letters) != 4 || letters[0].Subject != "commands.risk.work" || letters[0].Attempts != 2 || !strings.Contains(letters[0].Reason, "NO_LIMIT") {
		t.Fatalf("got dead letters %+v", letters)
	}

	fixed.Store(true)
	if err := client.Redrive(t.Context(), letters[0]); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, never); string(r) != "never" {
		t.Errorf("got %q", r)
	}
	fails(t, client.Redrive(t.Context(), letters[0]), aegis.ErrNotFound)
	if n := len(deadLetters(t, svc)); n != 3 {
		t.Errorf("got %d dead letters, want 3", n)
	}
}

func TestPriorities(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	release := make(chan struct{})
	var order journal[string]
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) {
		<-release
		order.add(c.Data)
		return 0, nil
	}, aegis.Concurrency(1))
	start(t, svc)
	var jobs []*aegis.Job[int]
	add := func(data string, p aegis.Priority) {
		jobs = append(jobs, send[string, int](t, client, "risk", "work", data, aegis.AtPriority(p)))
	}
	add("first", aegis.Normal)
	eventually(t, "the first command runs", func() bool {
		for p, err := range jobs[0].Updates(t.Context()) {
			return err == nil && p.State == "running"
		}
		return false
	})
	for range 3 {
		add("low", aegis.Low)
		add("normal", aegis.Normal)
		add("high", aegis.High)
		add("critical", aegis.Critical)
	}
	close(release)
	for _, j := range jobs {
		wait(t, j)
	}
	want := []string{"first", "critical", "critical", "critical", "high", "high", "high", "normal", "normal", "normal", "low", "low", "low"}
	if got := order.all(); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}

	// A command of low priority gets its turn, however many critical commands there are.
	low := send[string, int](t, client, "risk", "work", "patient", aegis.AtPriority(aegis.Low))
	stop := make(chan struct{})
	var senders sync.WaitGroup
	for range 8 {
		senders.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				j := send[string, int](t, client, "risk", "work", "urgent", aegis.AtPriority(aegis.Critical))
				wait(t, j)
			}
		})
	}
	wait(t, low)
	close(stop)
	senders.Wait()
}

// Now and then a less urgent command gets a turn. That turn must not be lost on a priority that has no commands, here Low.
func TestTurnOfLessUrgentSkipsEmptyPriorities(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var urgent, urgentBefore atomic.Int32
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) {
		if time.Sleep(10 * time.Millisecond); c.Data == "patient" {
			urgentBefore.Store(urgent.Load())
		} else {
			urgent.Add(1)
		}
		return 0, nil
	}, aegis.Concurrency(1))
	const n = 200
	var jobs []*aegis.Job[int]
	for range n {
		jobs = append(jobs, send[string, int](t, client, "risk", "work", "urgent", aegis.AtPriority(aegis.High)))
	}
	jobs = append(jobs, send[string, int](t, client, "risk", "work", "patient"))
	start(t, svc)
	for _, j := range jobs {
		wait(t, j)
	}
	if urgentBefore.Load() > 40 {
		t.Errorf("the less urgent command ran after %d more urgent ones", urgentBefore.Load())
	}
}

func TestThousandCommandsAtOnce(t *testing.T) {
	t.Parallel()
	const n = 1000
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var running atomic.Int32
	release := make(chan struct{})
	instance := func() *aegis.Service {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) {
			running.Add(1)
			defer running.Add(-1)
			if err := c.Progress(50, strconv.Itoa(c.Data)); err != nil {
				return 0, err
			}
			select {
			case <-release:
				return c.Data*1000 + c.Attempt, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}, aegis.Attempts(1))
		start(t, svc)
		return svc
	}
	svc := instance()
	jobs := make([]*aegis.Job[int], n)
	var sending sync.WaitGroup
	for p := range 50 {
		sending.Go(func() {
			for i := p; i < n; i += 50 {
				jobs[i] = send[int, int](t, client, "risk", "work", i)
			}
		})
	}
	sending.Wait()
	if t.Failed() {
		t.FailNow()
	}
	eventually(t, "all commands run", func() bool { return running.Load() == n })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	fails(t, svc.Stop(ctx), aegis.ErrTimeout)
	cancel()
	eventually(t, "all handlers have returned", func() bool { return running.Load() == 0 })
	close(release)
	second := instance()
	for i, j := range jobs { // the run that Stop cancelled does not count as an attempt
		if r := wait(t, j); r != i*1000+1 {
			t.Fatalf("command %d: got %d", i, r)
		}
	}
	if letters := deadLetters(t, second); len(letters) > 0 {
		t.Errorf("got %d dead letters, want none", len(letters))
	}
}

// A handler that ignores its ctx when Stop runs out of time costs an attempt. Another instance takes the command over after the ack
// wait, and the result of the first handler does not count.
func TestCommandWhoseHandlerIgnoresStop(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	started, release := make(chan struct{}, 1), make(chan struct{})
	instance := func(fn func(c *aegis.Command[string]) (int, error)) *aegis.Service {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) { return fn(c) }, aegis.Attempts(2))
		start(t, svc)
		return svc
	}
	first := instance(func(*aegis.Command[string]) (int, error) {
		started <- struct{}{}
		<-release
		return -1, nil
	})
	shortenAckWait(t, srv, "AEGIS_COMMANDS", time.Second)
	j := send[string, int](t, client, "risk", "work", "x")
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, first.Stop(ctx), aegis.ErrTimeout, "1 handlers")
	instance(func(c *aegis.Command[string]) (int, error) { return c.Attempt, nil })
	if r := wait(t, j); r != 2 {
		t.Errorf("got the result of attempt %d, want 2", r)
	}
	close(release)
	if r := wait(t, aegis.Attach[int](client, "risk", "work", j.ID)); r != 2 {
		t.Errorf("the outcome has become %d", r)
	}
}

// A delivery that is held up for longer than the ack wait must not take the command away from the instance that handles it by then.
func TestDelayedDeliveryDoesNotTakeOver(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	link := startProxy(t, srv)
	client := newService(t, srv, "shop")
	var runs journal[string]
	release := make(chan struct{})
	instance := func(name string, opts ...aegis.Option) {
		svc := newService(t, srv, "risk", opts...)
		handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[string]) (string, error) {
			runs.add(name + " runs " + c.Data)
			if c.Data == "second" {
				return name, nil
			}
			select {
			case <-release:
				return name, nil
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}, aegis.Concurrency(1))
		start(t, svc)
	}
	maker := newService(t, srv, "risk") // makes the consumers, so that the others know the short ack wait
	handleCommand(t, maker, "work", func(context.Context, *aegis.Command[string]) (string, error) { return "", nil })
	start(t, maker)
	if err := maker.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	shortenAckWait(t, srv, "AEGIS_COMMANDS", time.Second)
	instance("slow", aegis.WithURL("nats://"+link.address))
	if _, err := client.Discover(t.Context(), "risk"); err != nil { // so that send need not ask the slow instance
		t.Fatal(err)
	}
	js := manage(t, srv)
	eventually(t, "the slow instance has asked for the next command", func() bool {
		c, err := js.Consumer(t.Context(), "AEGIS_COMMANDS", "risk~work")
		return err == nil && c.CachedInfo().NumWaiting > 0
	})
	link.hold(toClient) // what is delivered now arrives late
	first := send[string, string](t, client, "risk", "work", "first")
	instance("fast")
	runs.wait(t, 1)
	link.heal()
	second := send[string, string](t, client, "risk", "work", "second") // for the slow one, because the other is busy
	if r := wait(t, second); r != "slow" {
		t.Errorf("the %s instance handled the second command", r)
	}
	close(release)
	if r := wait(t, first); r != "fast" {
		t.Errorf("the %s instance handled the first command", r)
	}
	if got, want := runs.all(), []string{"fast runs first", "slow runs second"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Both the sender and the worker of a command survive a restart of the server.
func TestCommandSurvivesServerRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	svc, client := newService(t, srv, "risk", reconnect), newService(t, srv, "shop", reconnect)
	running, release := make(chan struct{}), make(chan struct{})
	var runs atomic.Int32
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		if runs.Add(1) == 1 {
			close(running)
		}
		<-release
		return "done", nil
	})
	start(t, svc)
	j := send[string, string](t, client, "risk", "work", "x")
	result := make(chan string, 1)
	go func() { result <- wait(t, j) }()
	<-running
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	close(release) // the handler returns while there is no server
	startServer(t, samePort, store)
	if r := <-result; r != "done" {
		t.Errorf("got %q", r)
	}
	if runs.Load() != 1 {
		t.Errorf("got %d runs, want 1", runs.Load())
	}
}

func TestUnusableCommandStreams(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		words  []string
		config jetstream.StreamConfig
	}{
		"bucket": {[]string{"KV_aegis_commands", "republish", "aegis.jobs.>"}, jetstream.StreamConfig{Name: "KV_aegis_commands", Subjects: []string{"$KV.aegis_commands.>"}, AllowMsgTTL: true}},
		"queue":  {[]string{"AEGIS_COMMANDS", "workqueue"}, jetstream.StreamConfig{Name: "AEGIS_COMMANDS", Subjects: []string{"commands.>"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			if _, err := manage(t, srv).CreateStream(t.Context(), c.config); err != nil {
				t.Fatal(err)
			}
			svc := newService(t, srv, "risk")
			handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
			fails(t, svc.Start(t.Context()), aegis.ErrInvalid, c.words...)
		})
	}
}

func TestKilledWorker(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	first := startProcess(t, "commands", srv)
	if line, _ := first.line(t); line != "ready" {
		t.Fatal(line)
	}
	shortenAckWait(t, srv, "AEGIS_COMMANDS", time.Second)
	client := newService(t, srv, "shop")
	j := send[string, string](t, client, "risk", "work", "x")
	for p, err := range j.Updates(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if p.Percent == 50 {
			break
		}
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		return fmt.Sprint(c.Attempt, " ", c.Last.Percent, " ", c.Last.Message), nil
	}, aegis.Attempts(2))
	start(t, svc)
	if r := wait(t, j); r != "2 50 half of x" {
		t.Errorf("got %q", r)
	}

	// A command that kills its process at each attempt fails.
	if err := svc.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	exit := send[string, string](t, client, "risk", "work", "EXIT")
	for range 3 {
		p := startProcess(t, "commands", srv)
		eventually(t, "the process ends or the command has failed", func() bool {
			select {
			case _, ok := <-p.lines:
				return !ok
			default:
			}
			return len(deadLetters(t, client)) > 0
		})
	}
	fails(t, waitError(t, exit), aegis.ErrInternal, "2 times", "never finished")
}

// A worker that was paused for longer than its ack wait has lost its command to another worker. It notices that, whether or not
// it reports progress, and it neither overwrites the outcome nor acknowledges the message.
func TestPausedWorker(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("no SIGSTOP")
	}
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	for _, data := range []string{"PAUSED", "SILENT"} {
		paused := startProcess(t, "commands", srv)
		if line, _ := paused.line(t); line != "ready" {
			t.Fatal(line)
		}
		shortenAckWait(t, srv, "AEGIS_COMMANDS", time.Second) // applies to workers that start later
		j := send[string, string](t, client, "risk", "work", data)
		if line, _ := paused.line(t); line != data+" 1 " {
			t.Fatal(line)
		}
		if err := paused.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		svc := newService(t, srv, "risk")
		attempts, release := make(chan int, 10), make(chan struct{})
		handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
			attempts <- c.Attempt
			<-release
			return "the second", nil
		})
		start(t, svc)
		if n := <-attempts; n != 2 {
			t.Errorf("got attempt %d, want 2", n)
		}
		if err := paused.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if line, _ := paused.line(t); line != "FENCED" {
			t.Errorf("the paused worker printed %q", line)
		}
		close(release)
		if r := wait(t, j); r != "the second" {
			t.Errorf("got %q", r)
		}
		eventually(t, "the queue is empty", func() bool {
			st, err := manage(t, srv).Stream(t.Context(), "AEGIS_COMMANDS")
			return err == nil && st.CachedInfo().State.Msgs == 0
		})
		if len(attempts) > 0 {
			t.Error("the command ran once more")
		}
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := paused.Process.Kill(); err != nil {
			t.Error(err)
		}
	}
}

// A command that was returned to its queue and then sent again has two messages in the queue. They must not run at the same time.
func TestCommandWithTwoMessagesRunsOnceAtATime(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var running, overlaps, runs atomic.Int32
	instance := func(fn func(context.Context) error) *aegis.Service {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[map[string]int]) (int, error) {
			runs.Add(1)
			if running.Add(1) > 1 {
				overlaps.Add(1)
			}
			defer running.Add(-1)
			return c.Attempt, fn(ctx)
		}, aegis.Concurrency(1))
		start(t, svc)
		return svc
	}
	data := map[string]int{}
	for i := range 20 { // the order of the keys in the encoded data is random
		data[strconv.Itoa(i)] = i
	}
	first := instance(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	j := send[map[string]int, int](t, client, "risk", "work", data, aegis.IdempotencyKey("k"))
	eventually(t, "the command runs", func() bool { return running.Load() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, first.Stop(ctx), aegis.ErrTimeout)
	eventually(t, "the handler has returned", func() bool { return running.Load() == 0 })
	send[map[string]int, int](t, client, "risk", "work", data, aegis.IdempotencyKey("k"))
	for range 2 {
		instance(func(context.Context) error { time.Sleep(500 * time.Millisecond); return nil })
	}
	if r := wait(t, j); r != 1 || runs.Load() != 2 || overlaps.Load() != 0 {
		t.Errorf("got the result of attempt %d, %d runs, %d of them during another run", r, runs.Load(), overlaps.Load())
	}
}

func TestCommandEdgeCases(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	answers := func(next aegis.HandlerFunc) aegis.HandlerFunc { // answers instead of the handler
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			if m.Header.Get("X-Answer") != "" {
				return []byte{7}, nil
			}
			return next(ctx, m)
		}
	}
	svc := newService(t, srv, "risk", aegis.WithMiddleware(answers))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		return 1, c.Progress(1, strings.Repeat("long", 1<<20))
	})
	handleCommand(t, svc, "fail", func(context.Context, *aegis.Command[int]) (int, error) {
		return 0, errors.New(strings.Repeat("long", 1<<20))
	}, aegis.Attempts(1))
	start(t, svc)
	if r := wait(t, send[int, int](t, client, "risk", "work", 1)); r != 1 {
		t.Errorf("got %d", r)
	}
	fails(t, waitError(t, send[int, int](t, client, "risk", "fail", 1)), aegis.ErrInternal, "longlong")
	j, err := aegis.SendCommand[int, int](aegis.WithHeader(t.Context(), "X-Answer", "x"), client, "risk", "work", 1)
	if err != nil {
		t.Fatal(err)
	}
	if r := wait(t, j); r != 7 {
		t.Errorf("got %d", r)
	}
	_, err = aegis.SendCommand[int, int](aegis.WithHeader(t.Context(), "bad key", "x"), client, "risk", "work", 1, aegis.IdempotencyKey("bad"))
	fails(t, err, aegis.ErrInvalid, "bad key")
	fails(t, waitError(t, aegis.Attach[int](client, "risk", "work", "bad")), aegis.ErrNotFound) // it leaves no record
}

// An outcome that can't be written while the server is away is written when it is back, and the command does not run again.
func TestOutcomeIsKeptWhileServerIsAway(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var runs atomic.Int32
	running, release := make(chan struct{}, 9), make(chan struct{})
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		runs.Add(1)
		running <- struct{}{}
		<-release
		if c.Data == 2 {
			return 0, errors.New("no funds")
		}
		return c.Data + 1, nil
	}, aegis.Attempts(1))
	start(t, svc)
	good, bad := send[int, int](t, client, "risk", "work", 1), send[int, int](t, client, "risk", "work", 2)
	<-running
	<-running
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	close(release)
	time.Sleep(5 * time.Second) // longer than one attempt to write the outcome
	startServer(t, samePort, store)
	if n := wait(t, good); n != 2 {
		t.Errorf("got %d, want 2", n)
	}
	fails(t, waitError(t, bad), aegis.ErrInternal, "no funds")
	if n := runs.Load(); n != 2 {
		t.Errorf("the handler was called %d times, want 2", n)
	}
}

// A run whose outcome was never written counts as a crash, also if the next run is in the same instance.
func TestRunsAreToldApart(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Attempt, nil }, aegis.Attempts(3))
	start(t, svc)
	kv, err := manage(t, srv).KeyValue(t.Context(), "aegis_commands")
	if err != nil {
		t.Fatal(err)
	}
	// As if this instance had claimed it and then ended without a result.
	rec := fmt.Sprintf(`{"state":"running","attempt":1,"time":%q,"digest":"","owner":%q,"run":"another","delivery":1,"nonce":"x"}`, time.Now().Format(time.RFC3339), svc.ID())
	if _, err := kv.Create(t.Context(), "risk.work.k", []byte(rec)); err != nil {
		t.Fatal(err)
	}
	job := send[int, int](t, svc, "risk", "work", 1, aegis.IdempotencyKey("k")) // wakes it
	if n := wait(t, job); n != 2 {
		t.Errorf("the result is from attempt %d, want 2", n)
	}
	entry, err := kv.Get(t.Context(), "risk.work.k")
	if err != nil {
		t.Fatal(err)
	}
	var stored struct {
		State   string
		Percent float64
		Crashes int
		Owner   string
	}
	if err := json.Unmarshal(entry.Value(), &stored); err != nil {
		t.Fatal(err)
	}
	if stored.State != "completed" || stored.Percent != 100 || stored.Crashes != 1 || stored.Owner != svc.ID() {
		t.Errorf("the record is %s", entry.Value())
	}
}

// If somebody empties the queue, a send with the same key makes the command run, whatever its state.
func TestQueueIsFilledAgain(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"queued", "retrying"} {
		t.Run(state, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			client := newService(t, srv, "shop")
			var runs atomic.Int32
			instance := func() *aegis.Service {
				svc := newService(t, srv, "risk")
				handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
					if runs.Add(1) == 1 && state == "retrying" {
						return 0, errors.New("not yet")
					}
					return c.Attempt, nil
				}, aegis.Backoff(time.Hour, time.Hour))
				start(t, svc)
				return svc
			}
			want := 1
			if state == "retrying" {
				instance()
				want = 2
			}
			key := aegis.IdempotencyKey("k")
			job := send[int, int](t, client, "risk", "work", 7, key)
			if state == "retrying" {
				eventually(t, "the first attempt has failed", func() bool { return ackPending(t, srv, "AEGIS_COMMANDS", "risk~work") == 1 && runs.Load() == 1 })
				for p := range job.Updates(t.Context()) {
					if p.State == "retrying" {
						break
					}
				}
			}
			st, err := manage(t, srv).Stream(t.Context(), "AEGIS_COMMANDS")
			if err != nil {
				t.Fatal(err)
			}
			if err := st.Purge(t.Context()); err != nil {
				t.Fatal(err)
			}
			if state == "queued" {
				instance()
			}
			send[int, int](t, client, "risk", "work", 7, key)
			if n := wait(t, job); n != want {
				t.Errorf("the result is from attempt %d, want %d", n, want)
			}
			send[int, int](t, client, "risk", "work", 7, key) // has an outcome
			if n := runs.Load(); int(n) != want {
				t.Errorf("the handler was called %d times, want %d", n, want)
			}
		})
	}
}

// A handler that gives up by itself has failed. Only Cancel cancels a command.
func TestHandlersOwnCancel(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) {
		if c.Data == 1 {
			return 0, context.Canceled
		}
		return 0, &aegis.Error{Code: aegis.ErrCanceled.Code, Message: "by the bank"}
	}, aegis.Attempts(1))
	start(t, svc)
	for data, text := range map[int]string{1: "context canceled", 2: "by the bank"} {
		job := send[int, int](t, svc, "risk", "work", data)
		err := waitError(t, job)
		fails(t, err, aegis.ErrInternal, "the handler returned", text)
		if errors.Is(err, aegis.ErrCanceled) {
			t.Errorf("%v counts as cancelled", err)
		}
		if all := updates(t, job); all[len(all)-1].State != "failed" {
			t.Errorf("the state is %s", all[len(all)-1].State)
		}
	}
}

// While the account's quota is used up, the outcome of a command can't be written. It is kept, and the command does not run again.
func TestOutcomeIsKeptWhileAccountIsFull(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var runs atomic.Int32
	running, release := make(chan struct{}, 1), make(chan struct{})
	handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (string, error) {
		runs.Add(1)
		running <- struct{}{}
		<-release
		return strings.Repeat("x", 10_000), nil
	}, aegis.Attempts(1))
	start(t, svc)
	job := send[int, string](t, svc, "risk", "work", 1)
	<-running
	limits := server.JetStreamAccountLimits{MaxMemory: -1, MaxStore: 1, MaxStreams: -1, MaxConsumers: -1}
	limitAccount(t, srv, limits)
	close(release)
	time.Sleep(4 * time.Second)
	limits.MaxStore = -1
	limitAccount(t, srv, limits)
	if r := wait(t, job); len(r) != 10_000 {
		t.Errorf("got %d bytes", len(r))
	}
	if n := runs.Load(); n != 1 {
		t.Errorf("the handler was called %d times, want once", n)
	}
}

// If somebody removes the message of a command that runs, another send does not start a second run beside the first.
func TestQueueIsEmptiedWhileCommandRuns(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var runs atomic.Int32
	release := make(chan struct{})
	for range 2 {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) {
			runs.Add(1)
			<-release
			return 1, nil
		})
		start(t, svc)
	}
	key := aegis.IdempotencyKey("k")
	job := send[int, int](t, client, "risk", "work", 7, key)
	eventually(t, "it runs", func() bool { return runs.Load() == 1 })
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_COMMANDS")
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	send[int, int](t, client, "risk", "work", 7, key)
	time.Sleep(500 * time.Millisecond)
	close(release)
	if n := wait(t, job); n != 1 || runs.Load() != 1 {
		t.Errorf("got %d after %d runs", n, runs.Load())
	}
}
