package aegis_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
)

func deadLetters(tb testing.TB, s *aegis.Service) (letters []aegis.DeadLetter) {
	tb.Helper()
	for d, err := range s.DeadLetters(context.Background()) {
		if err != nil {
			tb.Fatal(err)
		}
		letters = append(letters, d)
	}
	return letters
}

func TestEventIsRetriedThenBecomesDeadLetter(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, other := newService(t, srv, "risk"), newService(t, srv, "audit")
	failures := map[string]func() error{
		"error": func() error { return &aegis.Error{Code: "NO_LIMIT", Message: "no limit set"} },
		"panic": func() error { panic("ouch") },
		"exit":  func() error { runtime.Goexit(); return nil },
	}
	var attempts journal[aegis.Event[string]]
	var fixed atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
		attempts.add(e)
		if fail := failures[e.Data]; fail != nil && !fixed.Load() {
			return fail()
		}
		return nil
	}, aegis.Attempts(3), aegis.Backoff(time.Millisecond, 5*time.Millisecond))
	var others journal[string]
	subscribe(t, other, ">", into(&others))
	subscribe(t, svc, "*.created", into(&others), aegis.Broadcast())
	start(t, svc)
	start(t, other)

	reasons := map[string]string{"error": "NO_LIMIT: no limit set", "panic": "ouch", "exit": "Goexit"}
	for data := range failures {
		publish(t, other, "order", "created", data, aegis.IdempotencyKey(data), aegis.EventVersion("2.0"))
	}
	var letters []aegis.DeadLetter
	eventually(t, "there are three dead letters", func() bool { letters = deadLetters(t, svc); return len(letters) == 3 })
	if n := len(attempts.all()); n != 9 {
		t.Errorf("%d attempts, want 9", n)
	}
	for _, d := range letters {
		var data string
		if err := aegis.MsgPack.Unmarshal(d.Data, &data); err != nil {
			t.Fatal(err)
		}
		if d.Subject != "events.order.created" || !strings.Contains(d.Consumer, "risk") || !strings.Contains(d.Reason, reasons[data]) || d.Attempts != 3 ||
			time.Since(d.Time) > time.Minute || d.Sequence == 0 {
			t.Errorf("got %+v", d)
		}
	}
	others.wait(t, 6)

	// A redriven event reaches only the consumer that failed to handle it, and nothing but its sequence has changed.
	fixed.Store(true)
	first := attempts.all()[0]
	i := slices.IndexFunc(letters, func(d aegis.DeadLetter) bool { return bytes.HasSuffix(d.Data, []byte(first.Data)) })
	if err := other.Redrive(t.Context(), letters[i]); err != nil {
		t.Fatal(err)
	}
	again := attempts.wait(t, 10)[9]
	if again.Sequence <= first.Sequence {
		t.Errorf("got sequence %d, want more than %d", again.Sequence, first.Sequence)
	}
	again.Sequence = first.Sequence
	if !again.Time.Equal(first.Time) {
		t.Errorf("got time %v, want %v", again.Time, first.Time)
	}
	again.Time = first.Time
	if !reflect.DeepEqual(again, first) {
		t.Errorf("got %+v, want %+v", again, first)
	}
	if left := deadLetters(t, other); len(left) != 2 {
		t.Errorf("got dead letters %+v, want 2", left)
	}
	fails(t, other.Redrive(t.Context(), letters[i]), aegis.ErrNotFound, "dead letter "+strconv.FormatUint(letters[i].Sequence, 10))
	fails(t, other.Redrive(t.Context(), aegis.DeadLetter{}), aegis.ErrInvalid)
	publish(t, other, "user", "created", "last")
	others.wait(t, 8)
	if n := len(others.all()); n != 8 {
		t.Errorf("the other consumers got %v", others.all())
	}

	// An event that fails again becomes a dead letter again, which can be redriven with other data.
	fixed.Store(false)
	i = (i + 1) % 3
	if err := svc.Redrive(t.Context(), letters[i]); err != nil {
		t.Fatal(err)
	}
	attempts.wait(t, 13)
	eventually(t, "it is a dead letter again", func() bool { letters = deadLetters(t, svc); return len(letters) == 2 })
	last := letters[1]
	last.Data, _ = aegis.MsgPack.Marshal("mended")
	last.Header = nil
	if err := svc.Redrive(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	if e := attempts.wait(t, 14)[13]; e.Data != "mended" || e.Domain != "order" || e.Type != "created" || e.Attempt != 1 {
		t.Errorf("got %+v", e)
	}
}

func TestUndecodableEventBecomesDeadLetterAtOnce(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[Order]
	subscribe(t, svc, "order.*", into(&got), aegis.Backoff(time.Minute, time.Minute))
	start(t, svc)
	publish(t, svc, "order", "created", []int{1, 2})
	publish(t, svc, "order", "created", Order{SKU: "x"})
	var letters []aegis.DeadLetter
	eventually(t, "there is a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	if d := letters[0]; d.Attempts != 1 || !strings.Contains(d.Reason, "INVALID_ARGUMENT") || !strings.Contains(d.Reason, "Order") {
		t.Errorf("got %+v", d)
	}
	got.wait(t, 1)
}

// As long as a dead letter can't be stored, its event waits. The dead letter that is stored at last has the handler's error as
// its reason.
func TestEventWaitsWhileDeadLettersCannotBeStored(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[int]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		got.add(e.Attempt)
		return errors.New("the true reason")
	}, aegis.Attempts(2), aegis.Backoff(time.Millisecond, time.Millisecond))
	start(t, svc)
	js := manage(t, srv)
	setSubject := func(subject string) {
		st, err := js.Stream(t.Context(), "AEGIS_DEAD")
		if err != nil {
			t.Fatal(err)
		}
		config := st.CachedInfo().Config
		config.Subjects = []string{subject}
		if _, err := js.UpdateStream(t.Context(), config); err != nil {
			t.Fatal(err)
		}
	}
	setSubject("nothing.>")
	publish(t, svc, "order", "created", 1)
	got.wait(t, 2)
	time.Sleep(100 * time.Millisecond) // so that storing fails at least once; the test is valid if it doesn't
	setSubject("aegis.dead.>")
	var letters []aegis.DeadLetter
	eventually(t, "there is a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	if d := letters[0]; d.Attempts != 2 || !strings.Contains(d.Reason, "the true reason") || len(got.all()) != 2 {
		t.Errorf("got %d attempts, dead letter %+v", len(got.all()), d)
	}
}

// Other clients can send events with headers that nats.go would not send, and events too large to be copied into a dead letter.
func TestDeadLettersOfMalformedAndLargeEvents(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t), func(o *server.Options) { o.MaxPayload = 16 << 10 })
	svc := newService(t, srv, "risk")
	subscribe(t, svc, "order.*", into(&journal[int]{}), aegis.Concurrency(1))
	start(t, svc)
	c, err := net.Dial("tcp", srv.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	header := "NATS/1.0\r\nodd key: x\r\nX-Good: y\r\nNats-Expected-Last-Sequence: 0\r\n\r\n"
	large := strings.Repeat("z", 16<<10)
	fmt.Fprintf(c, "CONNECT {\"headers\":true,\"verbose\":false}\r\nHPUB events.order.odd %d %d\r\n%s??\r\nPUB events.order.large %d\r\n%s\r\n", len(header), len(header)+2, header, len(large), large)
	var letters []aegis.DeadLetter
	eventually(t, "there are two dead letters", func() bool { letters = deadLetters(t, svc); return len(letters) == 2 })
	if d := letters[0]; string(d.Data) != "??" || d.Header.Get("X-Good") != "y" || d.Header.Get("Nats-Expected-Last-Sequence") != "" {
		t.Errorf("got %+v", d)
	}
	if d := letters[1]; len(d.Data) != 0 || !strings.Contains(d.Reason, "sequence 2 of AEGIS_EVENTS") || !strings.Contains(d.Reason, "INVALID_ARGUMENT") {
		t.Errorf("got %+v", d)
	}
}

func TestEventThatKillsItsProcessBecomesDeadLetter(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	var attempts []int // of the runs, by the event's own count
	for n := 0; ; n++ {
		p := startProcess(t, "events", srv)
		if n == 0 {
			if line, _ := p.line(t); line != "ready" {
				t.Fatal(line)
			}
			shortenAckWait(t, srv, "AEGIS_EVENTS", 2*time.Second)
			publish(t, publisher, "order", "created", "EXIT")
		}
		var lines []string
		dead := false
		eventually(t, "the process ends or there is a dead letter", func() bool {
			select {
			case line, ok := <-p.lines:
				dead = dead || !ok
				lines = append(lines, line)
			case <-time.After(50 * time.Millisecond): // asking for dead letters all the time would slow other tests down
			}
			return dead || len(deadLetters(t, publisher)) > 0
		})
		for _, line := range lines {
			if text, ok := strings.CutPrefix(line, "EXIT "); ok {
				attempt, err := strconv.Atoi(text)
				if err != nil {
					t.Fatal(line)
				}
				attempts = append(attempts, attempt)
			}
		}
		if !dead {
			publish(t, publisher, "order", "created", "harmless")
			for line, ok := "", true; ok && line != "harmless 1"; {
				line, ok = p.line(t)
			}
			break
		}
	}
	letters := deadLetters(t, publisher)
	// There are 2 attempts, and 3 more deliveries that may end without a result. On a busy machine the ack wait may be over before a
	// delivery is run, so that the run is missing; but none comes after the fifth delivery, and none comes twice.
	if slices.Max(attempts) > 5 || slices.Max(attempts) <= 2 || !slices.IsSorted(attempts) || len(slices.Compact(slices.Clone(attempts))) != len(attempts) {
		t.Errorf("the event was run at the attempts %v", attempts)
	}
	if len(letters) != 1 || letters[0].Attempts != 5 || !strings.Contains(letters[0].Reason, "not handled again") {
		t.Errorf("got the dead letters %+v", letters)
	}
}

// As long as the dead letter can't be stored, the command has no outcome. Stop doesn't wait for that longer than its ctx allows,
// and the next instance stores both without running the handler again.
func TestFailedCommandWhileDeadLettersCannotBeStored(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var runs atomic.Int32
	instance := func() *aegis.Service {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(context.Context, *aegis.Command[string]) (int, error) {
			runs.Add(1)
			return 0, errors.New("the true reason")
		}, aegis.Attempts(1))
		start(t, svc)
		return svc
	}
	svc := instance()
	limitMessages(t, srv, "AEGIS_DEAD", 1)
	j := send[string, int](t, client, "risk", "work", "x", aegis.IdempotencyKey("x"))
	eventually(t, "the command runs", func() bool { return runs.Load() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, svc.Stop(ctx), aegis.ErrTimeout)
	limitMessages(t, srv, "AEGIS_DEAD", -1)
	svc = instance()
	fails(t, waitError(t, j), aegis.ErrInternal, "the true reason")
	if runs.Load() != 1 {
		t.Errorf("got %d runs, want 1", runs.Load())
	}

	// A Redrive that failed halfway can be repeated.
	letter := deadLetters(t, svc)[0]
	limitMessages(t, srv, "AEGIS_COMMANDS", 1)
	if err := svc.Redrive(t.Context(), letter); err == nil {
		t.Error("Redrive succeeded although the command could not be queued")
	}
	limitMessages(t, srv, "AEGIS_COMMANDS", -1)
	if err := svc.Redrive(t.Context(), letter); err != nil {
		t.Error(err)
	}
	eventually(t, "the command runs again", func() bool { return runs.Load() == 2 })
}

// A delivery that Stop cuts short counts as an attempt, but it does not make a dead letter: only an error does, and then it is the
// reason.
func TestDeliveryCutShortByStopCountsAsAttempt(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	var attempts journal[int]
	instance := func(fn func(context.Context) error) *aegis.Service {
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", func(ctx context.Context, e aegis.Event[int]) error {
			attempts.add(e.Attempt)
			return fn(ctx)
		}, aegis.Attempts(2), aegis.Backoff(time.Millisecond, time.Millisecond))
		start(t, svc)
		return svc
	}
	for n := range 2 {
		svc := instance(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		if n == 0 {
			publish(t, publisher, "order", "created", 1)
		}
		attempts.wait(t, n+1)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		fails(t, svc.Stop(ctx), aegis.ErrTimeout)
		cancel()
	}
	instance(func(context.Context) error { return errors.New("no such account") })
	eventually(t, "the event is a dead letter", func() bool { return len(deadLetters(t, publisher)) == 1 })
	if got := attempts.all(); !slices.Equal(got, []int{1, 2, 3}) {
		t.Errorf("attempts %v, want 1, 2, 3", got)
	}
	if d := deadLetters(t, publisher)[0]; d.Attempts != 3 || !strings.Contains(d.Reason, "no such account") {
		t.Errorf("got a dead letter after %d attempts because of %q", d.Attempts, d.Reason)
	}
}

// Letters that are redriven at once don't evict each other, even if the stream keeps one message of each subject.
func TestRedriveManyWithLimitPerSubject(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	const n = 50
	var healthy atomic.Bool
	var got deliveries
	subscribe(t, svc, "order.*", func(ctx context.Context, e aegis.Event[int]) error {
		if !healthy.Load() {
			return errors.New("not yet")
		}
		return got.handle(ctx, e)
	}, aegis.Attempts(1), aegis.Concurrency(1))
	start(t, svc)
	for i := range n {
		publish(t, svc, "order", fmt.Sprintf("created%d", i), i)
	}
	eventually(t, "all are dead letters", func() bool { return len(deadLetters(t, svc)) == n })
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	config := st.CachedInfo().Config
	config.MaxMsgsPerSubject = 1
	if _, err := manage(t, srv).UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	healthy.Store(true)
	for _, d := range deadLetters(t, svc) {
		if err := svc.Redrive(t.Context(), d); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "all are handled", func() bool { return got.eachOnce(t, n) })
	if letters := deadLetters(t, svc); len(letters) > 0 {
		t.Errorf("%d letters are left", len(letters))
	}
}

// The reason in a dead letter is what was seen. A new version with fewer Attempts sees only that an event was delivered often.
func TestReasonOfDeadLetter(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	first := newService(t, srv, "risk")
	var failed atomic.Int32
	subscribe(t, first, "order.*", func(context.Context, aegis.Event[int]) error {
		failed.Add(1)
		return errors.New("no funds")
	}, aegis.Attempts(10), aegis.Backoff(time.Millisecond, 100*time.Millisecond))
	start(t, first)
	publish(t, first, "order", "created", 1)
	eventually(t, "six attempts have failed", func() bool { return failed.Load() >= 6 })
	if err := first.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := newService(t, srv, "risk")
	subscribe(t, second, "order.*", func(context.Context, aegis.Event[int]) error { return nil }, aegis.Attempts(1))
	start(t, second)
	var letters []aegis.DeadLetter
	eventually(t, "there is a dead letter", func() bool { letters = deadLetters(t, second); return len(letters) == 1 })
	if reason := letters[0].Reason; !strings.Contains(reason, "does not know how they ended") || strings.Contains(reason, "never finished") {
		t.Errorf("the reason is %q", reason)
	}
}

// Nothing but dead letters is stored in AEGIS_DEAD, so that replacing a busy instance evicts none of them.
func TestDeadLettersAreNotEvicted(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	if _, err := manage(t, srv).CreateStream(t.Context(), jetstream.StreamConfig{Name: "AEGIS_DEAD", Subjects: []string{"aegis.dead.>"}, MaxMsgs: 1}); err != nil {
		t.Fatal(err)
	}
	publisher := newService(t, srv, "shop")
	instance := func() (svc *aegis.Service, running *journal[int]) {
		svc, running = newService(t, srv, "risk"), &journal[int]{}
		subscribe(t, svc, "order.*", func(ctx context.Context, e aegis.Event[int]) error {
			if e.Data < 0 {
				return aegis.Permanent(errors.New("no such account"))
			}
			running.add(e.Data)
			<-ctx.Done()
			return ctx.Err()
		})
		handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) {
			running.add(c.Data)
			<-ctx.Done()
			return 0, ctx.Err()
		})
		start(t, svc)
		return svc, running
	}
	for n := range 3 {
		svc, running := instance()
		if n == 0 {
			publish(t, publisher, "order", "created", -1)
			for i := range 20 {
				publish(t, publisher, "order", "created", i)
				send[int, int](t, publisher, "risk", "work", i)
			}
		}
		running.wait(t, 40)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		fails(t, svc.Stop(ctx), aegis.ErrTimeout)
		cancel()
	}
	letters := deadLetters(t, publisher)
	if len(letters) != 1 || letters[0].Sequence != 1 || !strings.Contains(letters[0].Reason, "no such account") {
		t.Errorf("got the letters %+v", letters)
	}
}

// A price as a float32 and a time with a zone look different once MessagePack has carried them. The key of a command that was redriven
// still belongs to the same data, and only to that.
func TestKeyOfRedrivenCommand(t *testing.T) {
	t.Parallel()
	type order struct {
		Price float32   `json:"price"`
		Until time.Time `json:"until"`
	}
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "orders"), newService(t, srv, "shop")
	var runs atomic.Int32
	handleCommand(t, svc, "buy", func(_ context.Context, c *aegis.Command[order]) (int32, error) {
		if runs.Add(1) == 1 {
			return 0, errors.New("closed")
		}
		return runs.Load(), nil
	}, aegis.Attempts(1))
	start(t, svc)
	data := order{0.1, time.Date(2026, 11, 27, 9, 0, 0, 0, time.FixedZone("", 3600))}
	fails(t, waitError(t, send[order, int32](t, client, "orders", "buy", data, aegis.IdempotencyKey("k"))), aegis.ErrInternal, "closed")
	if err := client.Redrive(t.Context(), deadLetters(t, svc)[0]); err != nil {
		t.Fatal(err)
	}
	for range 2 { // while it is queued or runs, and when it has its outcome
		if n := wait(t, send[order, int32](t, client, "orders", "buy", data, aegis.IdempotencyKey("k"))); n != 2 {
			t.Errorf("got the result of run %d, want 2", n)
		}
	}
	data.Price = 0.2
	_, err := aegis.SendCommand[order, int32](t.Context(), client, "orders", "buy", data, aegis.IdempotencyKey("k"))
	fails(t, err, aegis.ErrInvalid, "other data")
}
