package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/aegistrader/aegis"
)

func TestEventsForLater(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, shop := newService(t, srv, "risk"), newService(t, srv, "shop", aegis.WithVersion("1.0.0"))
	type arrival struct {
		event aegis.Event[int]
		at    time.Time
	}
	var got journal[arrival]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		got.add(arrival{e, time.Now()})
		return nil
	})
	start(t, svc)
	begin := time.Now()
	publish(t, shop, "order", "created", 1, aegis.At(begin.Add(1200*time.Millisecond)), aegis.IdempotencyKey("one"), aegis.EventVersion("1.2"))
	publish(t, shop, "order", "created", 1, aegis.At(begin.Add(1200*time.Millisecond)), aegis.IdempotencyKey("one")) // stored once
	publish(t, shop, "order", "created", 2, aegis.After(600*time.Millisecond))
	publish(t, shop, "order", "created", 3, aegis.At(begin.Add(-time.Hour)))
	publish(t, shop, "order", "created", 4, aegis.After(-1))
	if err := aegis.PublishBatch(t.Context(), shop, "order", "many", []int{10, 11, 12}, aegis.After(600*time.Millisecond), aegis.IdempotencyKey("k")); err != nil {
		t.Fatal(err)
	}
	if err := shop.Stop(t.Context()); err != nil { // the server delivers them by itself
		t.Fatal(err)
	}
	due := map[int]time.Duration{1: 1200 * time.Millisecond, 2: 600 * time.Millisecond, 3: 0, 4: 0, 10: 600 * time.Millisecond, 11: 600 * time.Millisecond, 12: 600 * time.Millisecond}
	ids := map[int]string{1: "one", 10: "k-0", 11: "k-1", 12: "k-2"}
	for _, a := range got.wait(t, len(due)) {
		e := a.event
		late := a.at.Sub(begin) - due[e.Data]
		if want := ids[e.Data]; late < 0 || late > 2*time.Second || e.Domain != "order" || e.Source != "shop" || e.Attempt != 1 || want != "" && e.ID != want || e.ID == "" {
			t.Errorf("got %+v %v late", e, late)
		}
		if e.Data == 1 && e.Version != "1.2" {
			t.Errorf("the version is %q", e.Version)
		}
	}
	eventually(t, "all are acknowledged", func() bool { return ackPending(t, srv, "AEGIS_EVENTS", "risk~order~+") == 0 })
	if n := len(got.all()); n != len(due) {
		t.Errorf("got %d events, want %d", n, len(due))
	}
}

// What was due while the server was away is delivered when it is back.
func TestEventForLaterDuringRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	svc := newService(t, srv, "risk")
	var got journal[int]
	subscribe(t, svc, "order.*", into(&got))
	start(t, svc)
	publish(t, svc, "order", "created", 1, aegis.After(500*time.Millisecond))
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	time.Sleep(time.Second)
	startServer(t, samePort, store)
	got.wait(t, 1)
}

func TestEventsExpire(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	shop := newService(t, srv, "shop")
	var got journal[int]
	publish(t, shop, "order", "created", 1, aegis.ExpireAfter(time.Second))
	publish(t, shop, "order", "created", 2, aegis.After(100*time.Millisecond), aegis.ExpireAfter(time.Second))
	publish(t, shop, "order", "created", 3, aegis.ExpireAfter(time.Hour))
	publish(t, shop, "order", "created", 4, aegis.After(100*time.Millisecond), aegis.ExpireAfter(time.Hour))
	publish(t, shop, "order", "created", 5)
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "three events are left", func() bool {
		info, err := st.Info(t.Context())
		return err == nil && info.State.Msgs == 3
	})
	svc := newService(t, srv, "risk")
	subscribe(t, svc, "order.*", into(&got), aegis.FromStart())
	start(t, svc)
	all := got.wait(t, 3)
	if slices.Sort(all); !slices.Equal(all, []int{3, 4, 5}) {
		t.Errorf("got %v", all)
	}
	if letters := deadLetters(t, svc); len(letters) > 0 {
		t.Errorf("got %d dead letters", len(letters))
	}
}

func TestInvalidSchedules(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "shop", aegis.WithRetention(time.Hour, 1<<20))
	try := func(opts ...aegis.CallOption) error {
		return aegis.Publish(t.Context(), svc, "order", "created", 1, opts...)
	}
	for name, err := range map[string]error{
		"max_age":     try(aegis.After(2 * time.Hour)),
		"At":          try(aegis.After(time.Second), aegis.At(time.Now().Add(time.Second))),
		"ExpireAfter": try(aegis.ExpireAfter(100 * time.Millisecond)),
		"(0s)":        try(aegis.ExpireAfter(0)),
		"only events": func() error {
			_, err := aegis.Call[int, int](t.Context(), svc, "orders", "m", 1, aegis.After(time.Second))
			return err
		}(),
	} {
		if e := fails(t, err, aegis.ErrInvalid, name); !e.NotRun {
			t.Errorf("%s: NotRun is not set", name)
		}
	}
	if err := try(aegis.After(50*time.Minute), aegis.ExpireAfter(24*time.Hour)); err != nil {
		t.Error(err)
	}
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if c := st.CachedInfo().Config; c.MaxAge != time.Hour || c.MaxBytes != 1<<20 {
		t.Errorf("the stream has max_age %v and max_bytes %d", c.MaxAge, c.MaxBytes)
	}
	for _, opt := range []aegis.Option{aegis.WithRetention(-1, 0), aegis.WithRetention(0, -1), aegis.WithRetention(time.Millisecond, 0)} {
		_, err := aegis.New("shop", aegis.WithURL(srv.ClientURL()), opt)
		fails(t, err, aegis.ErrInvalid, "WithRetention")
	}

	// A stream that somebody else has made is used as it is.
	for _, test := range []struct {
		subjects []string
		want     string
	}{
		{[]string{"events.>"}, "add aegis.schedules.events.>"},
		{[]string{"events.>", "aegis.schedules.events.>"}, "allow_msg_schedules"},
	} {
		srv := startServer(t, withJetStream(t))
		svc := newService(t, srv, "shop")
		if _, err := manage(t, srv).CreateStream(t.Context(), jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: test.subjects}); err != nil {
			t.Fatal(err)
		}
		fails(t, aegis.Publish(t.Context(), svc, "order", "created", 1, aegis.After(time.Minute)), aegis.ErrInvalid, test.want)
		fails(t, aegis.PublishBatch(t.Context(), svc, "order", "created", []int{1, 2}, aegis.After(time.Minute)), aegis.ErrInvalid, test.want)
		fails(t, aegis.Publish(t.Context(), svc, "order", "created", 1, aegis.ExpireAfter(time.Minute)), aegis.ErrInvalid, "allow_msg_ttl")
		publish(t, svc, "order", "created", 1)
	}
}

var errBankClosed = errors.New("the bank is closed")

type notice struct{ text string }

func (n *notice) Error() string { return n.text }

func TestPermanentAndRetryAfterWrap(t *testing.T) {
	t.Parallel()
	if aegis.Permanent(nil) != nil || aegis.RetryAfter(nil, time.Second) != nil {
		t.Error("a nil error does not stay nil")
	}
	for _, err := range []error{
		aegis.Permanent(fmt.Errorf("paying: %w", errBankClosed)), aegis.RetryAfter(fmt.Errorf("paying: %w", errBankClosed), time.Second),
	} {
		if !errors.Is(err, errBankClosed) || err.Error() != "paying: the bank is closed" {
			t.Errorf("got %v", err)
		}
	}
	if n, ok := errors.AsType[*notice](aegis.Permanent(&notice{"x"})); !ok || n.text != "x" {
		t.Error("errors.As does not see through Permanent")
	}
}

// RetryAfter brings the event back to the subscription that asked for it, as often as it likes, and uses up no attempt.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		stream   *jetstream.StreamConfig
		allowed  int
		attempts []int
	}{
		"stream of aegis":          {nil, 1, []int{1, 1, 1, 1}},
		"stream without schedules": {&jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, AllowMsgTTL: true}, 4, []int{1, 2, 3, 4}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			if test.stream != nil {
				if _, err := manage(t, srv).CreateStream(t.Context(), *test.stream); err != nil {
					t.Fatal(err)
				}
			}
			svc := newService(t, srv, "risk")
			var got journal[aegis.Event[string]]
			var at journal[time.Time]
			var others journal[string]
			subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
				got.add(e)
				at.add(time.Now())
				if len(got.all()) < 4 {
					return fmt.Errorf("paying: %w", aegis.RetryAfter(errBankClosed, 300*time.Millisecond))
				}
				return nil
			}, aegis.Attempts(test.allowed))
			subscribe(t, svc, "order.*", into(&others), aegis.Durable("audit"))
			subscribe(t, svc, ">", into(&others), aegis.Durable("everything"))
			start(t, svc)
			publish(t, newService(t, srv, "shop"), "order", "created", "pay", aegis.IdempotencyKey("k"), aegis.ExpireAfter(time.Hour))
			events := got.wait(t, 4)
			for i, e := range events {
				if e.Attempt != test.attempts[i] || e.ID != "k" || e.Type != "created" || e.Source != "shop" || e.Data != "pay" || !e.Time.Equal(events[0].Time) {
					t.Errorf("event %d is %+v", i, e)
				}
			}
			times := at.all()
			for i := 1; i < 4; i++ {
				if pause := times[i].Sub(times[i-1]); pause < 290*time.Millisecond || pause > 3*time.Second {
					t.Errorf("pause %d was %v", i, pause)
				}
			}
			eventually(t, "all are acknowledged", func() bool {
				return ackPending(t, srv, "AEGIS_EVENTS", "risk~order~+")+ackPending(t, srv, "AEGIS_EVENTS", "risk~audit")+ackPending(t, srv, "AEGIS_EVENTS", "risk~everything") == 0
			})
			if n := len(others.all()); n != 2 {
				t.Errorf("the other subscriptions got %d events, want one each", n)
			}
			if letters := deadLetters(t, svc); len(letters) > 0 {
				t.Errorf("got dead letters: %s", letters[0].Reason)
			}
		})
	}
}

// An event that was to be handled again and then fails for good becomes a dead letter like any other.
func TestPermanent(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var healthy atomic.Bool
	var got journal[string]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
		got.add(fmt.Sprint(e.Data, " ", e.Attempt, " ", e.ID))
		switch {
		case healthy.Load():
			return nil
		case len(got.all()) == 1:
			return aegis.RetryAfter(errBankClosed, time.Millisecond)
		}
		return fmt.Errorf("the account: %w", aegis.Permanent(aegis.RetryAfter(errors.New("it was closed"), time.Hour)))
	})
	start(t, svc)
	publish(t, svc, "order", "created", "pay", aegis.IdempotencyKey("k"))
	var letters []aegis.DeadLetter
	eventually(t, "there is a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	if d := letters[0]; d.Attempts != 1 || d.Reason != "risk: INTERNAL: the account: it was closed" && d.Reason != "INTERNAL: the account: it was closed" || d.Subject != "events.order.created" {
		t.Errorf("got %+v", d)
	}
	healthy.Store(true)
	if err := svc.Redrive(t.Context(), letters[0]); err != nil {
		t.Fatal(err)
	}
	if all := got.wait(t, 3); !slices.Equal(all, []string{"pay 1 k", "pay 1 k", "pay 1 k"}) {
		t.Errorf("got %q", all)
	}
	fails(t, svc.Discard(t.Context(), letters[0]), aegis.ErrNotFound)
}

func TestPermanentAndRetryAfterOfCommands(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var attempts journal[int]
	handleCommand(t, svc, "pay", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		if c.Data == "permanent" {
			return "", aegis.Permanent(errBankClosed)
		}
		attempts.add(c.Attempt)
		if len(attempts.all()) < 4 {
			return "", aegis.RetryAfter(errBankClosed, 50*time.Millisecond)
		}
		return "paid", nil
	}, aegis.Attempts(2))
	start(t, svc)
	if r := wait(t, send[string, string](t, svc, "risk", "pay", "later")); r != "paid" {
		t.Errorf("got %q", r)
	}
	if all := attempts.all(); !slices.Equal(all, []int{1, 1, 1, 1}) {
		t.Errorf("the attempts were %v", all)
	}
	begin := time.Now()
	_, err := send[string, string](t, svc, "risk", "pay", "permanent").Wait(t.Context())
	fails(t, err, aegis.ErrInternal, "the bank is closed")
	if d := time.Since(begin); d > 3*time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error { return aegis.Permanent(errBankClosed) })
	start(t, svc)
	publish(t, svc, "order", "created", 1)
	publish(t, svc, "order", "created", 2)
	var letters []aegis.DeadLetter
	eventually(t, "there are two dead letters", func() bool { letters = deadLetters(t, svc); return len(letters) == 2 })
	if err := manage(t, srv).DeleteConsumer(t.Context(), "AEGIS_EVENTS", letters[0].Consumer); err != nil { // nobody can redrive them
		t.Fatal(err)
	}
	if err := svc.Discard(t.Context(), letters[0]); err != nil {
		t.Error(err)
	}
	if left := deadLetters(t, svc); len(left) != 1 || left[0].Sequence != letters[1].Sequence {
		t.Errorf("left are %+v", left)
	}
	fails(t, svc.Discard(t.Context(), letters[0]), aegis.ErrNotFound)
	fails(t, svc.Redrive(t.Context(), letters[0]), aegis.ErrNotFound)
	fails(t, svc.Discard(t.Context(), aegis.DeadLetter{}), aegis.ErrInvalid)
}
