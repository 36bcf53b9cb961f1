package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func subscribe[T any](tb testing.TB, s *aegis.Service, pattern string, fn func(context.Context, aegis.Event[T]) error, opts ...aegis.HandlerOption) {
	tb.Helper()
	if err := aegis.Subscribe(s, pattern, fn, opts...); err != nil {
		tb.Fatal(err)
	}
}

func publish[T any](tb testing.TB, s *aegis.Service, domain, eventType string, data T, opts ...aegis.CallOption) {
	tb.Helper()
	if err := aegis.Publish(context.Background(), s, domain, eventType, data, opts...); err != nil {
		tb.Fatal(err)
	}
}

// into returns a handler that adds the payload of each event to the journal l.
func into[T any](l *journal[T]) func(context.Context, aegis.Event[T]) error {
	return func(_ context.Context, e aegis.Event[T]) error {
		l.add(e.Data)
		return nil
	}
}

func TestPublishAndSubscribe(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
		t.Run(codec.ContentType(), func(t *testing.T) {
			name := "risk-" + strings.TrimPrefix(codec.ContentType(), "application/")
			publisher := newService(t, srv, "shop", aegis.WithCodec(codec))
			svc := newService(t, srv, name, aegis.WithCodec(codec))
			var got journal[aegis.Event[Order]]
			take := func(_ context.Context, e aegis.Event[Order]) error { got.add(e); return nil }
			subscribe(t, svc, "order.created", take)
			start(t, svc)
			subscribe(t, svc, "order.changed", take) // after Start
			var numbers journal[int]
			subscribe(t, svc, "number.*", into(&numbers))

			before := time.Now()
			order := Order{SKU: "x", Qty: 3, Tags: map[string]string{"a": "b"}}
			publish(t, publisher, "order", "created", order, aegis.EventVersion("1.2"), aegis.IdempotencyKey(name+"/1"))
			first := got.wait(t, 1)[0]
			if first.Time.Before(before.Add(-time.Second)) || first.Time.After(time.Now().Add(time.Second)) || first.Sequence == 0 {
				t.Errorf("got time %v, sequence %d", first.Time, first.Sequence)
			}
			want := aegis.Event[Order]{ID: name + "/1", Domain: "order", Type: "created", Version: "1.2", Source: "shop", Time: first.Time, Sequence: first.Sequence, Attempt: 1, Data: order}
			if !reflect.DeepEqual(first, want) {
				t.Errorf("got %+v, want %+v", first, want)
			}
			publish(t, publisher, "order", "changed", order)
			if second := got.wait(t, 2)[1]; second.Type != "changed" || second.ID == "" || second.ID == first.ID || second.Sequence <= first.Sequence {
				t.Errorf("got %+v", second)
			}
			for n := range 130 { // a single byte does not identify the codec
				publish(t, publisher, "number", "one", n)
			}
			numbers.wait(t, 130)
			if err := svc.Stop(t.Context()); err != nil { // it must not receive the events of the next subtest
				t.Error(err)
			}
		})
	}
}

func TestEventFromPlainNATSClient(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[aegis.Event[Order]]
	subscribe(t, svc, "order.>", func(_ context.Context, e aegis.Event[Order]) error { got.add(e); return nil })
	start(t, svc)
	if _, err := manage(t, srv).Publish(t.Context(), "events.order.item.added", []byte(`{"sku":"x"}`)); err != nil {
		t.Fatal(err)
	}
	if e := got.wait(t, 1)[0]; e.Data.SKU != "x" || e.Domain != "order" || e.Type != "item.added" || e.ID != "1" || e.Source != "" {
		t.Errorf("got %+v", e)
	}
}

func TestSubscriptionPatterns(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	a, b := newService(t, srv, "a"), newService(t, srv, "b")
	events := []string{"payment.captured", "payment.refused", "order.created", "order.item.added", "user.created"}
	matches := map[string][]string{
		"payment.captured": {"payment.captured"},
		"payment.*":        {"payment.captured", "payment.refused"},
		"order.>":          {"order.created", "order.item.added"},
		"*.created":        {"order.created", "user.created"},
		"*.*.added":        {"order.item.added"},
		">":                events,
		"*.*":              {"payment.captured", "payment.refused", "order.created", "user.created"},
	}
	logs := map[string]*journal[string]{}
	listen := func(s *aegis.Service, name, pattern string, opts ...aegis.HandlerOption) {
		l := &journal[string]{}
		logs[name] = l
		subscribe(t, s, pattern, into(l), opts...)
	}
	for pattern := range matches {
		listen(a, "a "+pattern, pattern)
	}
	listen(b, "b payment.*", "payment.*") // each service gets all events
	listen(a, "a payment.* again", "payment.*", aegis.Durable("again"))
	start(t, a)
	start(t, b)
	fails(t, aegis.Subscribe(a, "payment.*", into(&journal[string]{})), aegis.ErrInvalid, "payment.*", "Durable")
	fails(t, aegis.Subscribe(a, "order.>", into(&journal[string]{}), aegis.Durable("again")), aegis.ErrInvalid, "again")
	for _, e := range events {
		domain, eventType, _ := strings.Cut(e, ".")
		publish(t, a, domain, eventType, e)
	}
	matches["payment.* again"] = matches["payment.*"]
	for name, l := range logs {
		want := matches[name[2:]]
		if got := sorted(l.wait(t, len(want))); !slices.Equal(got, sorted(want)) {
			t.Errorf("%s got %v, want %v", name, got, want)
		}
	}
	publish(t, a, "last", "one", "last") // once it is handled, unwanted events would have been handled too
	for name, l := range logs {
		if name[2:] == ">" || name[2:] == "*.*" {
			l.wait(t, len(matches[name[2:]])+1)
		} else if len(l.all()) != len(matches[name[2:]]) {
			t.Errorf("%s got %v", name, l.all())
		}
	}
}

func TestInstancesShareEventsUnlessBroadcast(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	var shared, broadcast [3]journal[int]
	var instances [3]*aegis.Service
	for i := range instances {
		instances[i] = newService(t, srv, "risk")
		subscribe(t, instances[i], "order.*", into(&shared[i]), aegis.Concurrency(4))
		subscribe(t, instances[i], "price.*", into(&broadcast[i]), aegis.Broadcast())
		start(t, instances[i])
	}
	want := make([]int, 300)
	for i := range want {
		want[i] = i
		publish(t, publisher, "order", "created", i)
		publish(t, publisher, "price", "changed", i)
	}
	eventually(t, "all events are handled", func() bool { return len(shared[0].all())+len(shared[1].all())+len(shared[2].all()) >= len(want) })
	all := slices.Concat(shared[0].all(), shared[1].all(), shared[2].all())
	slices.Sort(all)
	if !slices.Equal(all, want) {
		t.Errorf("the instances got %v together", all)
	}
	for i := range instances {
		if len(shared[i].all()) < 20 {
			t.Errorf("instance %d got only %d of %d", i, len(shared[i].all()), len(want))
		}
		got := broadcast[i].wait(t, len(want))
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("instance %d got %v", i, got)
		}
	}
	for _, s := range instances {
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	js := manage(t, srv)
	eventually(t, "only the shared consumer is left", func() bool {
		st, err := js.Stream(t.Context(), "AEGIS_EVENTS")
		return err == nil && st.CachedInfo().State.Consumers == 1
	})
}

func TestSubscriptionIsDurable(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	publish(t, publisher, "order", "created", 1)
	var got, replayed journal[int]
	run := func(want ...int) {
		t.Helper()
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", into(&got))
		subscribe(t, svc, "order.*", into(&replayed), aegis.FromStart(), aegis.Durable("replay"))
		start(t, svc)
		publish(t, publisher, "order", "created", want[len(want)-1])
		for i, l := range []*journal[int]{&got, &replayed} {
			all := l.wait(t, len(want)+i)
			slices.Sort(all)
			if i == 1 {
				all = all[1:] // without event 1, which was published before the subscription
			}
			if !slices.Equal(all, want) {
				t.Errorf("got %v, want %v", all, want)
			}
		}
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	run(2)
	publish(t, publisher, "order", "created", 3) // while no instance runs
	run(2, 3, 4)
}

func TestEventIsStoredOncePerIdempotencyKey(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[aegis.Event[int]]
	subscribe(t, svc, ">", func(_ context.Context, e aegis.Event[int]) error { got.add(e); return nil })
	start(t, svc)
	for range 3 {
		publish(t, svc, "order", "created", 1, aegis.IdempotencyKey("42"))
		publish(t, svc, "order", "paid", 1, aegis.IdempotencyKey("42")) // another event, because its type differs
		if err := aegis.PublishBatch(t.Context(), svc, "order", "shipped", []int{1, 2, 3}, aegis.IdempotencyKey("42")); err != nil {
			t.Fatal(err)
		}
	}
	publish(t, svc, "last", "one", 0)
	var ids []string
	for _, e := range got.wait(t, 6) {
		ids = append(ids, e.Domain+"."+e.Type+" "+e.ID)
	}
	slices.Sort(ids)
	want := []string{"last.one", "order.created 42", "order.paid 42", "order.shipped 42-0", "order.shipped 42-1", "order.shipped 42-2"}
	ids[0] = strings.Fields(ids[0])[0] // without its ID, which is random
	if !slices.Equal(ids, want) {
		t.Errorf("got %v", ids)
	}
}

func TestPublishBatch(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t), func(o *server.Options) { o.MaxPayload = 64 << 10 })
	svc := newService(t, srv, "risk")
	batch := make([][]byte, 5000)
	for i := range batch {
		batch[i] = strconv.AppendInt(nil, int64(i), 10)
	}
	batch[17], batch[4711] = make([]byte, 64<<10), make([]byte, 63<<10) // too large alone, and with a dead letter's headers
	err := aegis.PublishBatch(t.Context(), svc, "order", "created", batch)
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || len(joined.Unwrap()) != 2 {
		t.Fatalf("got %v", err)
	}
	for i, index := range []string{"17", "4711"} {
		if e := fails(t, joined.Unwrap()[i], aegis.ErrInvalid, "max_payload"); e.Details["index"] != index || !e.NotRun {
			t.Errorf("got %+v, want index %s", e, index)
		}
	}
	fails(t, aegis.Publish(t.Context(), svc, "order", "created", batch[17]), aegis.ErrInvalid, "max_payload")
	if err := aegis.PublishBatch(t.Context(), svc, "order", "created", batch[:0]); err != nil {
		t.Error(err)
	}
	var got journal[string]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[[]byte]) error { got.add(string(e.Data)); return nil },
		aegis.FromStart(), aegis.Concurrency(1))
	start(t, svc)
	next := 0
	for _, data := range got.wait(t, len(batch)-2) {
		for next == 17 || next == 4711 {
			next++
		}
		if data != strconv.Itoa(next) {
			t.Fatalf("got %s, want %d", data, next)
		}
		next++
	}
}

func TestConcurrencyOneKeepsOrder(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	var got journal[int]
	for range 2 {
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
			if e.Data%10 == 3 && e.Attempt == 1 {
				return errors.New("not yet")
			}
			got.add(e.Data)
			return nil
		}, aegis.Concurrency(1), aegis.Backoff(20*time.Millisecond, 20*time.Millisecond))
		start(t, svc)
	}
	n := make([]int, 100)
	for i := range n {
		n[i] = i
	}
	if err := aegis.PublishBatch(t.Context(), publisher, "order", "created", n); err != nil {
		t.Fatal(err)
	}
	if all := got.wait(t, len(n)); !slices.Equal(all, n) {
		t.Errorf("got %v", all)
	}
}

func TestEventsPropagateContext(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	var seen journal[string]
	outer := func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			seen.add(fmt.Sprint(m.Kind, " ", m.Subject, " ", m.Source, " ", m.Header.Get("X-Token")))
			return next(ctx, m)
		}
	}
	svc := newService(t, srv, "risk", aegis.WithMiddleware(outer))
	var ids journal[string]
	subscribe(t, svc, "order.created", func(ctx context.Context, e aegis.Event[int]) error {
		ids.add(aegis.CorrelationID(ctx))
		if h := aegis.Headers(ctx); h.Get("traceparent") != traceparent {
			t.Errorf("got headers %v", h)
		}
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > time.Minute || time.Until(deadline) < 50*time.Second {
			t.Errorf("got deadline %v", deadline)
		}
		return aegis.Publish(ctx, svc, "order", "checked", e.Data)
	}, aegis.Deadline(time.Minute))
	subscribe(t, svc, "order.checked", func(ctx context.Context, e aegis.Event[int]) error {
		ids.add(aegis.CorrelationID(ctx))
		_, err := aegis.Call[int, int](ctx, svc, "risk", "check", e.Data)
		return err
	})
	handle(t, svc, "check", func(ctx context.Context, n int) (int, error) {
		ids.add(aegis.CorrelationID(ctx))
		if tp := aegis.Headers(ctx).Get("traceparent"); tp != traceparent {
			t.Errorf("got traceparent %q", tp)
		}
		return n, nil
	})
	start(t, svc)
	ctx := aegis.WithHeader(aegis.WithHeader(t.Context(), "traceparent", traceparent), "X-Token", "secret")
	if err := aegis.Publish(ctx, svc, "order", "created", 1, aegis.IdempotencyKey("order-1")); err != nil {
		t.Fatal(err)
	}
	if got := ids.wait(t, 3); !slices.Equal(got, []string{"order-1", "order-1", "order-1"}) {
		t.Errorf("got correlation IDs %v", got)
	}
	want := []string{"event events.order.created risk secret", "event events.order.checked risk ", "rpc rpc.risk.check risk "}
	if got := seen.all(); !slices.Equal(got, want) {
		t.Errorf("middleware saw %q", got)
	}
}

func TestUnfinishedEventsAreRedeliveredAfterStop(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	var ended, handled journal[int]
	instance := func(fn func(context.Context, aegis.Event[int]) error) *aegis.Service {
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", fn, aegis.Attempts(1), aegis.Concurrency(3))
		start(t, svc)
		return svc
	}
	for stop := range 2 {
		var running journal[int]
		svc := instance(func(ctx context.Context, e aegis.Event[int]) error {
			running.add(e.Data)
			<-ctx.Done()
			ended.add(e.Data)
			if e.Data == 2 { // this handler runs longer than Stop waits
				time.Sleep(time.Second)
			}
			return ctx.Err()
		})
		if stop == 0 {
			if err := aegis.PublishBatch(t.Context(), publisher, "order", "created", []int{1, 2, 3, 4, 5}); err != nil {
				t.Fatal(err)
			}
		}
		running.wait(t, 3)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		fails(t, svc.Stop(ctx), aegis.ErrTimeout, "3 handlers")
		cancel()
		if n := len(ended.all()); n != 3*(stop+1) {
			t.Errorf("the contexts of %d handlers were cancelled, want %d", n, 3*(stop+1))
		}
	}
	svc := instance(into(&handled))
	got := handled.wait(t, 5)
	slices.Sort(got)
	if !slices.Equal(got, []int{1, 2, 3, 4, 5}) {
		t.Errorf("handled %v", got)
	}
	if letters := deadLetters(t, svc); len(letters) > 0 {
		t.Errorf("dead letters: %+v", letters)
	}
}

func TestPublishDuringServerRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	svc := newService(t, srv, "risk", reconnect)
	var got journal[int]
	subscribe(t, svc, "order.*", into(&got))
	start(t, svc)
	var stored journal[int]
	var failed atomic.Int64
	var done atomic.Bool
	var publishers sync.WaitGroup
	for p := range 4 {
		publishers.Go(func() {
			for i := p; !done.Load(); i += 4 {
				if err := aegis.Publish(context.Background(), svc, "order", "created", i); err == nil {
					stored.add(i)
				} else {
					failed.Add(1)
					if !errors.Is(err, aegis.ErrUnavailable) {
						t.Error(err)
					}
				}
			}
		})
	}
	stored.wait(t, 100)
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "publishing fails", func() bool { return failed.Load() > 10 })
	sticky := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		sticky <- aegis.Publish(ctx, svc, "order", "created", -1, aegis.Sticky())
	}()
	err := aegis.PublishBatch(t.Context(), svc, "order", "created", []int{-2, -3})
	if joined, ok := err.(interface{ Unwrap() []error }); !ok || len(joined.Unwrap()) != 2 {
		t.Errorf("got %v", err)
	}
	fails(t, err, aegis.ErrUnavailable)
	startServer(t, samePort, store)
	n := len(stored.all())
	stored.wait(t, n+100)
	if err := <-sticky; err != nil {
		t.Error(err)
	}
	done.Store(true)
	publishers.Wait()
	eventually(t, "every event that was stored is handled", func() bool {
		handled := map[int]bool{}
		for _, i := range got.all() {
			handled[i] = true
		}
		return handled[-1] && !slices.ContainsFunc(stored.all(), func(i int) bool { return !handled[i] })
	})
}

func TestInvalidEventArguments(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	ctx := t.Context()
	for _, name := range [][2]string{{"", "a"}, {"a", ""}, {"a.b", "c"}, {"a", "b..c"}, {"a", "*"}, {">", "a"}, {"a b", "c"}, {"1a", "b"}, {"a", "$b"}, {"ä", "b"}} {
		if e := fails(t, aegis.Publish(ctx, svc, name[0], name[1], 1), aegis.ErrInvalid, strconv.Quote(name[0]+"."+name[1])); !e.NotRun {
			t.Error("NotRun is not set")
		}
		fails(t, aegis.PublishBatch(ctx, svc, name[0], name[1], []int{1}), aegis.ErrInvalid)
	}
	for _, pattern := range []string{"", "order", "*", "order.", ".created", "order.>.x", "ord*.x", "a b.c", "order.cre>"} {
		fails(t, aegis.Subscribe(svc, pattern, into(&journal[int]{})), aegis.ErrInvalid, strconv.Quote(pattern))
	}
	fails(t, aegis.Subscribe[int](svc, "a.b", nil), aegis.ErrInvalid, "a.b", "nil")
	for _, c := range []struct {
		word string
		opt  aegis.CallOption
	}{
		{`EventVersion("1")`, aegis.EventVersion("1")}, {`EventVersion("")`, aegis.EventVersion("")},
		{`IdempotencyKey("")`, aegis.IdempotencyKey("")}, {`IdempotencyKey("a\nb")`, aegis.IdempotencyKey("a\nb")},
		{`ToInstance("x")`, aegis.ToInstance("x")},
	} {
		fails(t, aegis.Publish(ctx, svc, "a", "b", 1, c.opt), aegis.ErrInvalid, c.word)
	}
	for _, c := range []struct {
		word string
		opt  aegis.HandlerOption
	}{
		{"Attempts(0)", aegis.Attempts(0)}, {"Backoff(0s, 1s)", aegis.Backoff(0, time.Second)}, {"Backoff(2s, 1s)", aegis.Backoff(2*time.Second, time.Second)},
		{"Deadline(-1s)", aegis.Deadline(-time.Second)}, {`Durable("a.b")`, aegis.Durable("a.b")}, {"Concurrency(0)", aegis.Concurrency(0)},
	} {
		fails(t, aegis.Subscribe(svc, "a.b", into(&journal[int]{}), c.opt), aegis.ErrInvalid, c.word)
	}
	for _, opt := range []aegis.HandlerOption{aegis.Attempts(2), aegis.Backoff(1, 1), aegis.Deadline(1), aegis.Durable("x"), aegis.Broadcast(), aegis.FromStart()} {
		fails(t, aegis.Handle(svc, "m", echo, opt), aegis.ErrInvalid)
	}
	for _, opt := range []aegis.CallOption{aegis.EventVersion("1.0"), aegis.IdempotencyKey("x")} {
		_, err := call[int, int](svc, "risk", "m", 1, opt)
		fails(t, err, aegis.ErrInvalid)
	}
	_, err := aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithReplicas(0))
	fails(t, err, aegis.ErrInvalid, "WithReplicas(0)")
	fails(t, aegis.Publish(ctx, svc, "a", "b", make(chan int)), aegis.ErrInvalid, "a.b")
	fails(t, aegis.Publish(aegis.WithHeader(ctx, "bad key", "x"), svc, "a", "b", 1), aegis.ErrInvalid, "bad key")
	if err := svc.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	fails(t, aegis.Publish(ctx, svc, "a", "b", 1), aegis.ErrClosed)
	fails(t, aegis.PublishBatch(ctx, svc, "a", "b", []int{1}), aegis.ErrClosed)
	fails(t, aegis.Subscribe(svc, "a.b", into(&journal[int]{})), aegis.ErrClosed)
}

func TestPublishBatchNotStored(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	js := manage(t, srv)
	st, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.order.>"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, opts := range [][]aegis.CallOption{nil, {aegis.Sticky()}} {
		promptly(t, func() {
			err := aegis.PublishBatch(t.Context(), svc, "payment", "captured", []int{1, 2}, opts...)
			if e := fails(t, err, aegis.ErrInvalid, "AEGIS_EVENTS", "events.payment.captured", "events.>"); !e.NotRun {
				t.Error("NotRun is not set")
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if e := fails(t, aegis.PublishBatch(ctx, svc, "order", "created", make([]int, 500)), aegis.ErrCanceled); !e.NotRun {
		t.Error("NotRun is not set")
	}
	publish(t, svc, "order", "last", 0)
	info, err := st.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.State.Msgs != 1 {
		t.Errorf("%d events are stored", info.State.Msgs)
	}
}

// An event that was sent once may have been stored, even if a later attempt could not be sent: NotRun must not be set.
func TestPublishBatchNotConfirmed(t *testing.T) {
	t.Parallel()
	srv := startServer(t) // without JetStream
	svc := newService(t, srv, "risk")
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	var n atomic.Int32
	if _, err := nc.Subscribe("events.>", func(m *nats.Msg) { // receives three events, answers only the first, and unsubscribes
		switch n.Add(1) {
		case 1:
			_ = m.Respond([]byte(`{"stream":"AEGIS_EVENTS","seq":1}`))
		case 3:
			_ = m.Sub.Unsubscribe()
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	err = aegis.PublishBatch(t.Context(), svc, "order", "created", []int{1, 2, 3}, aegis.Retry(aegis.RetryPolicy{AttemptTimeout: 100 * time.Millisecond}))
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || len(joined.Unwrap()) != 2 {
		t.Fatalf("got %v", err)
	}
	for _, err := range joined.Unwrap() {
		if e := fails(t, err, aegis.ErrUnavailable); e.NotRun || e.Details["index"] == "0" {
			t.Errorf("got %+v for an event that was sent", e)
		}
	}
}

func TestEventOfKilledInstanceIsRedelivered(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	first := startProcess(t, "events", srv)
	if line, _ := first.line(t); line != "ready" {
		t.Fatal(line)
	}
	shortenAckWait(t, srv, "AEGIS_EVENTS", time.Second) // applies to instances that start later
	publisher := newService(t, srv, "shop")
	publish(t, publisher, "order", "created", "SLEEP")
	if line, _ := first.line(t); line != "SLEEP 1" {
		t.Fatal(line)
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var got journal[aegis.Event[string]]
	svc := newService(t, srv, "risk")
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error { got.add(e); return nil })
	start(t, svc)
	if e := got.wait(t, 1)[0]; e.Data != "SLEEP" || e.Attempt != 2 {
		t.Errorf("got %+v", e)
	}
}

func TestNoEventIsLostWhenStreamLeaderStops(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.ClientURL())
	}
	svc := newService(t, servers[0], "risk", aegis.WithURL(urls...), aegis.WithReplicas(3))
	var got, stored journal[int]
	subscribe(t, svc, "order.*", into(&got))
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := svc.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var publishers sync.WaitGroup
	for p := range 4 {
		publishers.Go(func() {
			for i := p; !done.Load(); i += 4 {
				if err := aegis.Publish(ctx, svc, "order", "created", i, aegis.Sticky()); err != nil {
					t.Error(err)
					return
				}
				stored.add(i)
			}
		})
	}
	n := len(stored.wait(t, 100))
	leader := slices.IndexFunc(servers, func(s *server.Server) bool { return s.JetStreamIsStreamLeader("$G", "AEGIS_EVENTS") })
	if leader < 0 {
		t.Fatal("the stream has no leader")
	}
	servers[leader].Shutdown()
	eventually(t, "500 more events are stored after the leader has stopped", func() bool { return len(stored.all()) > n+500 })
	done.Store(true)
	publishers.Wait()
	missing := func() (missing []int) {
		handled := map[int]bool{}
		for _, i := range got.all() {
			handled[i] = true
		}
		for _, i := range stored.all() {
			if !handled[i] {
				missing = append(missing, i)
			}
		}
		return missing
	}
	for end := time.Now().Add(40 * time.Second); len(missing()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("events that were never handled: %v", missing())
		}
	}
}

// In a cluster, what an instance has asked for still comes after Stop has begun. If there is no time for these events any more, they
// go to the next instance, and their deliveries here are few.
func TestStopWithoutTimeInCluster(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	publisher := newService(t, servers[0], "shop")
	publish(t, publisher, "price", "changed", 0, aegis.Sticky()) // makes the stream, which takes a moment in a new cluster
	first := newService(t, servers[1], "risk")
	subscribe(t, first, "order.*", into(&journal[int]{}))
	start(t, first)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- first.Stop(ctx) }()
	<-ctx.Done()
	for i := range 3 {
		publish(t, publisher, "order", "created", i, aegis.Sticky())
	}
	<-stopped // with or without an error: no handler ran
	second := newService(t, servers[2], "risk")
	var attempts journal[int]
	subscribe(t, second, "order.*", func(_ context.Context, e aegis.Event[int]) error { attempts.add(e.Attempt); return nil })
	start(t, second)
	attempts.wait(t, 3)
	if most := slices.Max(attempts.all()); most > 3 {
		t.Errorf("an event was delivered %d times", most)
	}
	if letters := deadLetters(t, second); len(letters) > 0 {
		t.Errorf("dead letters: %+v", letters)
	}
}

// A batch gives up when no event was confirmed for WithTimeout, and not before.
func TestPublishBatchOverStalledLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	svc := newService(t, srv, "shop", aegis.WithURL("nats://"+p.address), aegis.WithTimeout(20*time.Second))
	publish(t, svc, "order", "created", 0)
	p.stall()
	time.AfterFunc(5*time.Second, p.heal)
	if err := aegis.PublishBatch(context.Background(), svc, "order", "created", make([]int, 3000)); err != nil {
		t.Error(err)
	}
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().State.Msgs; n != 3001 {
		t.Errorf("%d events are stored, want 3001", n)
	}
}

// The error of a batch stays readable, and has the error of each event.
func TestErrorOfLargeBatch(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "shop")
	data := make([]any, 100_000)
	for i := range data {
		data[i] = func() {}
	}
	err := aegis.PublishBatch(t.Context(), svc, "order", "created", data)
	fails(t, err, aegis.ErrInvalid, "and 99990 more")
	if n := strings.Count(err.Error(), "\n"); n > 20 {
		t.Errorf("the text has %d lines", n)
	}
	if joined, ok := err.(interface{ Unwrap() []error }); !ok || len(joined.Unwrap()) != len(data) {
		t.Error("the error does not unwrap to 100,000")
	}
}

// The error of an event of a batch has the correlation id besides its index.
func TestBatchErrorHasCorrelationID(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk", aegis.WithTimeout(200*time.Millisecond))
	silent := rawConn(t, srv.ClientURL())
	if _, err := silent.SubscribeSync("*.>"); err != nil { // takes what is published, and does not confirm it
		t.Fatal(err)
	}
	if err := silent.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := manage(t, srv).CreateStream(t.Context(), jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"other"}}); err != nil {
		t.Fatal(err)
	}
	e := fails(t, aegis.PublishBatch(t.Context(), svc, "order", "created", []int{1}), aegis.ErrTimeout)
	if e.Details["index"] != "0" || e.Details["correlation_id"] == "" {
		t.Errorf("got the details %v", e.Details)
	}
}
