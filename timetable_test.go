package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/aegistrader/aegis"
)

// state returns the present state of a command.
func state[R any](tb testing.TB, j *aegis.Job[R]) aegis.Progress {
	tb.Helper()
	for p, err := range j.Updates(tb.Context()) {
		if err != nil {
			tb.Fatal(err)
		}
		return p
	}
	tb.Fatal("there is no state")
	return aegis.Progress{}
}

func TestCommandForLater(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var ran journal[time.Time]
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		ran.add(time.Now())
		return c.Data + int(c.Priority)*10, nil
	})
	start(t, svc)
	due := time.Now().Add(1200 * time.Millisecond)
	job := send[int, int](t, client, "risk", "work", 1, aegis.At(due), aegis.IdempotencyKey("k"), aegis.AtPriority(aegis.High))
	if p := state(t, job); p.State != "scheduled" {
		t.Errorf("the state is %s", p.State)
	}
	send[int, int](t, client, "risk", "work", 1, aegis.IdempotencyKey("k")) // joins, and does not run it earlier
	cancelled := send[int, int](t, client, "risk", "work", 2, aegis.After(700*time.Millisecond))
	if err := cancelled.Cancel(t.Context()); err != nil {
		t.Error(err)
	}
	fails(t, waitError(t, cancelled), aegis.ErrCanceled)
	at := send[int, int](t, client, "risk", "work", 3, aegis.After(-time.Second))
	if n := wait(t, at); n != 3 {
		t.Errorf("got %d, want 3", n)
	}
	if n := wait(t, job); n != 21 {
		t.Errorf("got %d, want 21", n)
	}
	times := ran.wait(t, 2)
	if late := times[1].Sub(due); late < -50*time.Millisecond || late > 2*time.Second {
		t.Errorf("it ran %v late", late)
	}
	time.Sleep(300 * time.Millisecond) // for the schedule of the cancelled one to fire
	if n := len(ran.all()); n != 2 {
		t.Errorf("the handler was called %d times, want 2", n)
	}
}

// What is due while the server is away runs when it is back.
func TestCommandForLaterDuringRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data, nil })
	start(t, svc)
	job := send[int, int](t, svc, "risk", "work", 1, aegis.After(500*time.Millisecond))
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	time.Sleep(time.Second)
	startServer(t, samePort, store)
	if n := wait(t, job); n != 1 {
		t.Errorf("got %d, want 1", n)
	}
}

func TestCommandsExpire(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	begin := time.Now()
	nobody := send[int, int](t, client, "risk", "work", 1, aegis.ExpireAfter(time.Second))
	later := send[int, int](t, client, "risk", "work", 2, aegis.After(500*time.Millisecond), aegis.ExpireAfter(time.Second))
	last := send[int, int](t, client, "risk", "work", 3, aegis.ExpireAfter(time.Hour))
	e := fails(t, waitError(t, nobody), aegis.ErrTimeout, "had to begin by")
	if d := time.Since(begin); d < time.Second || d > 3*time.Second {
		t.Errorf("it expired after %v", d)
	}
	if e.Cause != nil {
		t.Errorf("the cause is %v", e.Cause)
	}
	fails(t, waitError(t, later), aegis.ErrTimeout)
	fails(t, later.Cancel(t.Context()), aegis.ErrInvalid, "failed")
	svc := newService(t, srv, "risk")
	var ran journal[int]
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		ran.add(c.Data)
		if c.Data == 4 {
			return 0, errors.New("no funds")
		}
		return c.Data, nil
	}, aegis.Attempts(100), aegis.Backoff(300*time.Millisecond, 300*time.Millisecond))
	start(t, svc)
	if n := wait(t, last); n != 3 {
		t.Errorf("got %d, want 3", n)
	}
	failing := send[int, int](t, client, "risk", "work", 4, aegis.ExpireAfter(time.Second))
	e = fails(t, waitError(t, failing), aegis.ErrTimeout)
	if e.Cause == nil || !strings.Contains(e.Cause.Message, "no funds") {
		t.Errorf("the cause is %v", e.Cause)
	}
	n := len(ran.all())
	time.Sleep(500 * time.Millisecond)
	if all := ran.all(); len(all) != n || all[0] != 3 || slices.Contains(all, 1) || slices.Contains(all, 2) {
		t.Errorf("ran %v", all)
	}
	if letters := deadLetters(t, client); len(letters) > 0 {
		t.Errorf("got dead letters: %s", letters[0].Reason)
	}
}

func TestScheduleCommand(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var ran journal[string]
	for range 3 {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "report", func(_ context.Context, c *aegis.Command[string]) (string, error) {
			ran.add(c.ID)
			return fmt.Sprint(c.Data, " ", c.Source, " ", c.Priority == aegis.High, " ", c.Attempt), nil
		})
		start(t, svc)
	}
	schedule := func(spec, data string) error {
		return aegis.ScheduleCommand(t.Context(), client, "tick", spec, "risk", "report", data, aegis.AtPriority(aegis.High))
	}
	list := func() (all []aegis.Schedule) {
		for sch, err := range client.Schedules(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, sch)
		}
		return all
	}
	send[string, string](t, client, "risk", "report", "x", aegis.After(time.Hour)) // is not one of the schedules
	if err := schedule("@every 1s", "all"); err != nil {
		t.Fatal(err)
	}
	set := list()
	if len(set) != 1 || set[0].Name != "tick" || set[0].Spec != "@every 1s" || set[0].Service != "risk" || set[0].Command != "report" || time.Since(set[0].Set) > time.Minute {
		t.Fatalf("got %+v", set)
	}
	if err := schedule("@every 1s", "all"); err != nil {
		t.Fatal(err)
	}
	ids := ran.wait(t, 3)
	for i, id := range ids {
		if !strings.HasPrefix(id, "tick@") || slices.Contains(ids[:i], id) {
			t.Errorf("the ids are %q", ids)
		}
	}
	if r := wait(t, aegis.Attach[string](client, "risk", "report", ids[0])); r != "all shop true 1" {
		t.Errorf("got %q", r)
	}
	if err := schedule("TZ=Europe/London 0 0 9 * * MON-FRI", "all"); err != nil { // replaces it
		t.Fatal(err)
	}
	if set := list(); len(set) != 1 || set[0].Spec != "TZ=Europe/London 0 0 9 * * MON-FRI" {
		t.Fatalf("got %+v", set)
	}
	if err := client.Unschedule(t.Context(), "risk", "report", "tick"); err != nil {
		t.Fatal(err)
	}
	if set := list(); len(set) != 0 {
		t.Errorf("got %+v", set)
	}
	fails(t, client.Unschedule(t.Context(), "risk", "report", "tick"), aegis.ErrNotFound)
	n := len(ran.all())
	time.Sleep(1500 * time.Millisecond)
	if m := len(ran.all()); m > n+1 {
		t.Errorf("it fired %d times after it was removed", m-n)
	}
}

func TestInvalidCommandSchedules(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "shop")
	try := func(name, spec string, opts ...aegis.CallOption) error {
		return aegis.ScheduleCommand(t.Context(), svc, name, spec, "risk", "report", 1, opts...)
	}
	for _, spec := range []string{
		"", " ", "TZ=Europe/London", "@every", "@every x", "@every 999ms", "@every -1m", "TZ=Europe/London @every 1m", "@at 2030-01-01T00:00:00Z",
		"@never", "* * * * *", "0 0 9 * * MON-FRI x", "99 0 9 * * *", "TZ=Mars/Olympus 0 0 9 * * *", "0 0 9 * * FUNDAY", "0 0 0 31 2 *",
	} {
		if err := try("tick", spec); err == nil {
			t.Errorf("%q is accepted", spec)
		} else {
			fails(t, err, aegis.ErrInvalid)
		}
	}
	for _, spec := range []string{"@daily", "@hourly", "@every 1m30s", "0 30 9 * * MON-FRI", "TZ=America/New_York 0 0 0 1 * *", "*/5 * * * * *"} {
		if err := try("tick", spec); err != nil {
			t.Errorf("%q: %v", spec, err)
		}
	}
	fails(t, try("a.b", "@daily"), aegis.ErrInvalid)
	for _, opt := range []aegis.CallOption{aegis.After(time.Hour), aegis.At(time.Now()), aegis.IdempotencyKey("k"), aegis.Sticky(), aegis.Retry(aegis.RetryPolicy{}), aegis.ExpireAfter(time.Millisecond), aegis.EventVersion("1.0")} {
		fails(t, try("tick", "@daily", opt), aegis.ErrInvalid)
	}
	fails(t, svc.Unschedule(t.Context(), "risk", "report", "*"), aegis.ErrInvalid)

	other := startServer(t, withJetStream(t))
	if _, err := manage(t, other).CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "AEGIS_COMMANDS", Subjects: []string{"commands.>", "aegis.schedules.commands.>"}, Retention: jetstream.WorkQueuePolicy,
	}); err != nil {
		t.Fatal(err)
	}
	client := newService(t, other, "shop")
	fails(t, aegis.ScheduleCommand(t.Context(), client, "tick", "@daily", "risk", "report", 1), aegis.ErrInvalid, "allow_msg_schedules")
	_, err := aegis.SendCommand[int, int](t.Context(), client, "risk", "report", 1, aegis.After(time.Minute))
	fails(t, err, aegis.ErrInvalid, "allow_msg_schedules")
}

// Without a worker, firings do not pile up for ever, and those that are left run when one comes.
func TestScheduleWithoutWorker(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	if err := aegis.ScheduleCommand(t.Context(), client, "tick", "@every 1s", "risk", "report", 1, aegis.ExpireAfter(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	if err := client.Unschedule(t.Context(), "risk", "report", "tick"); err != nil {
		t.Fatal(err)
	}
	svc := newService(t, srv, "risk")
	var ran atomic.Int32
	handleCommand(t, svc, "report", func(context.Context, *aegis.Command[int]) (int, error) { return int(ran.Add(1)), nil })
	start(t, svc)
	eventually(t, "the queue is empty", func() bool {
		st, err := manage(t, srv).Stream(t.Context(), "AEGIS_COMMANDS")
		return err == nil && st.CachedInfo().State.Msgs == 0
	})
	if n := ran.Load(); n < 1 || n > 3 {
		t.Errorf("%d firings ran, want those of the last 2 s", n)
	}
}

func TestCommandsList(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	send[int, int](t, client, "risk", "later", 1, aegis.After(time.Hour), aegis.IdempotencyKey("a/b"))
	send[int, int](t, client, "other", "work", 1)
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		if c.Data == 2 {
			return 0, aegis.Permanent(errors.New("no funds"))
		}
		return 1, nil
	})
	start(t, svc)
	wait(t, send[int, int](t, client, "risk", "work", 1, aegis.IdempotencyKey("one"), aegis.AtPriority(aegis.Critical)))
	_ = waitError(t, send[int, int](t, client, "risk", "work", 2, aegis.IdempotencyKey("two")))
	var got []string
	for c, err := range client.Commands(t.Context(), "risk") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(c.Service, " ", c.Command, " ", c.ID, " ", c.Source, " ", c.Priority, " ", c.Progress.State, " ", c.Error != nil))
	}
	want := []string{"risk later a/b shop 0 scheduled false", "risk work one shop 3 completed false", "risk work two shop 0 failed true"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, err := range client.Commands(t.Context(), "no.name") {
		fails(t, err, aegis.ErrInvalid)
	}
}

// A schedule survives a restart of the server, and each firing runs once.
func TestScheduleDuringRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	svc := newService(t, srv, "risk")
	var ran journal[string]
	handleCommand(t, svc, "report", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		ran.add(c.ID)
		return 1, nil
	})
	start(t, svc)
	if err := aegis.ScheduleCommand(t.Context(), svc, "tick", "@every 1s", "risk", "report", 1); err != nil {
		t.Fatal(err)
	}
	before := len(ran.wait(t, 1))
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	time.Sleep(3 * time.Second)
	startServer(t, samePort, store)
	ids := ran.wait(t, before+3)
	if n := len(slices.Compact(slices.Sorted(slices.Values(ids)))); n != len(ids) {
		t.Errorf("a firing ran twice: %q", ids)
	}
}

// Who follows a command that runs beyond its ExpireAfter does not ask the server all the time.
func TestFollowBeyondExpiry(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		time.Sleep(2500 * time.Millisecond)
		return c.Data, nil
	})
	start(t, svc)
	var reads atomic.Int32
	nc := manage(t, srv).Conn()
	if _, err := nc.Subscribe("$JS.API.STREAM.MSG.GET.KV_aegis_commands", func(*nats.Msg) { reads.Add(1) }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := wait(t, send[int, int](t, svc, "risk", "work", 7, aegis.ExpireAfter(time.Second))); n != 7 {
		t.Errorf("got %d, want 7", n)
	}
	if n := reads.Load(); n < 1 || n > 20 {
		t.Errorf("the record was read %d times, want a few", n)
	}
}
