package aegis_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"runtime"
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
)

func TestContextPropagation(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	type seen struct {
		correlation, source, trace, state, auth, hop string
		left                                         time.Duration
	}
	observed := make(chan seen, 4)
	watching := aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			d, _ := ctx.Deadline()
			h := aegis.Headers(ctx)
			observed <- seen{aegis.CorrelationID(ctx), m.Source, h.Get("traceparent"), h.Get("tracestate"), h.Get("Authorization"), h.Get("X-Hop"), time.Until(d)}
			return next(ctx, m)
		}
	})
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	back := newService(t, srv, "back", watching)
	handle(t, back, "last", echo)
	start(t, back)
	middle := newService(t, srv, "middle", watching)
	handle(t, middle, "first", func(ctx context.Context, s string) (string, error) {
		return aegis.Call[string, string](aegis.WithHeader(ctx, "X-Hop", "2"), middle, "back", "last", s)
	})
	start(t, middle)
	client := newService(t, srv, "client")

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	ctx = aegis.WithHeader(ctx, "traceparent", trace)
	ctx = aegis.WithHeader(ctx, "tracestate", "a=1")
	ctx = aegis.WithHeader(ctx, "Authorization", "none")
	ctx = aegis.WithHeader(ctx, "Authorization", "secret")
	if got, err := aegis.Call[string, string](ctx, client, "middle", "first", "hello"); got != "hello" || err != nil {
		t.Fatal(got, err)
	}
	first, second := <-observed, <-observed
	if first.source != "client" || second.source != "middle" {
		t.Errorf("sources: %q, %q", first.source, second.source)
	}
	if first.correlation == "" || first.correlation != second.correlation {
		t.Errorf("correlation ids: %q, %q", first.correlation, second.correlation)
	}
	if first.trace != trace || second.trace != trace || first.state != "a=1" || second.state != "a=1" {
		t.Errorf("trace context: %+v, %+v", first, second)
	}
	if first.auth != "secret" || second.auth != "" || first.hop != "" || second.hop != "2" {
		t.Errorf("headers: %+v, %+v", first, second)
	}
	if first.left > 3*time.Second || second.left > first.left || second.left < time.Second {
		t.Errorf("time left: %v, %v of 3s", first.left, second.left)
	}

	for _, id := range []string{"order-77", "an id. that is no token"} { // chosen by the user
		if _, err := aegis.Call[string, string](aegis.WithHeader(t.Context(), "Aegis-Correlation-Id", id), client, "middle", "first", "x"); err != nil {
			t.Fatal(err)
		}
		if first, second := <-observed, <-observed; first.correlation != id || second.correlation != id {
			t.Errorf("correlation ids: %q, %q, want %q", first.correlation, second.correlation, id)
		}
	}
	_, err := aegis.Call[string, string](aegis.WithHeader(t.Context(), "bad key", "v"), client, "middle", "first", "x")
	fails(t, err, aegis.ErrInvalid, "bad key")
}

func TestDeadlineReachesHandler(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	ended := make(chan error, 2)
	handle(t, svc, "wait", func(ctx context.Context, _ int) (int, error) {
		child, cancel := context.WithCancel(ctx) // most libraries begin with a derived context
		defer cancel()
		<-child.Done()
		ended <- ctx.Err()
		return 0, ctx.Err()
	})
	start(t, svc)
	client := newService(t, srv, "client", aegis.WithTimeout(50*time.Millisecond))
	for _, limit := range []time.Duration{0, 50 * time.Millisecond} {
		ctx := t.Context()
		if limit > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit)
			defer cancel()
		}
		_, err := aegis.Call[int, int](ctx, client, "svc", "wait", 1)
		e := fails(t, err, aegis.ErrTimeout)
		if !errors.Is(err, context.DeadlineExceeded) || e.NotRun {
			t.Errorf("got %+v", e)
		}
		if err := <-ended; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the handler's ctx ended with %v", err)
		}
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	_, err := aegis.Call[int, int](ctx, client, "svc", "wait", 1)
	if e := fails(t, err, aegis.ErrTimeout); !e.NotRun {
		t.Error("NotRun = false, want true: the deadline had passed before the call")
	}
}

// A timeout of math.MaxInt64 must not overflow: the handler still gets a deadline in the far future.
func TestFarDeadline(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client", aegis.WithTimeout(math.MaxInt64))
	handle(t, svc, "left", func(ctx context.Context, _ int) (int64, error) {
		deadline, _ := ctx.Deadline()
		return int64(time.Until(deadline)), nil
	})
	start(t, svc)
	for _, opts := range [][]aegis.CallOption{nil, {aegis.Idempotent(), aegis.Retry(aegis.RetryPolicy{AttemptTimeout: math.MaxInt64})}} {
		if left, err := call[int, int64](client, "svc", "left", 1, opts...); err != nil || left < int64(time.Hour) {
			t.Error(time.Duration(left), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), math.MaxInt64)
		if left, err := aegis.Call[int, int64](ctx, client, "svc", "left", 1, opts...); err != nil || left < int64(time.Hour) {
			t.Error(time.Duration(left), err)
		}
		cancel()
	}
}

func TestCancelReachesHandler(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	one := aegis.WithPool(1) // so that cancellations arrive in order
	svc, client := newService(t, srv, "svc", one), newService(t, srv, "client", one)
	running, ended := make(chan int, 2), make(chan error, 2)
	handle(t, svc, "wait", func(ctx context.Context, n int) (int, error) {
		running <- n
		<-ctx.Done()
		ended <- ctx.Err()
		return 0, nil
	}, aegis.Concurrency(1))
	start(t, svc)
	begin := func(n int) (cancel context.CancelFunc, failed chan error) {
		ctx, cancel := context.WithCancel(t.Context())
		failed = make(chan error, 1)
		go func() {
			_, err := aegis.Call[int, int](ctx, client, "svc", "wait", n, aegis.Sticky()) // retries OVERLOADED while another call waits
			failed <- err
		}()
		return cancel, failed
	}
	cancel0, failed0 := begin(0)
	<-running
	cancel1, failed1 := begin(1)      // waits in the queue
	time.Sleep(50 * time.Millisecond) // lets the call be sent; the test also passes if it is not
	cancel1()
	fails(t, <-failed1, aegis.ErrCanceled)
	at := time.Now()
	cancel0()
	if e := fails(t, <-failed0, aegis.ErrCanceled, "no answer from rpc.svc.wait"); e.NotRun || !errors.Is(e, context.Canceled) {
		t.Errorf("got %+v", e)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the handler's ctx ended with %v", err)
	}
	if took := time.Since(at); took > time.Second {
		t.Errorf("the cancellation reached the handler after %v, want at most 1 s", took)
	}
	cancel7, failed7 := begin(7)
	if n := <-running; n != 7 {
		t.Errorf("call %d ran, although it was canceled while it waited", n)
	}
	cancel7()
	<-failed7
}

func TestExpiredRequestIsNotRun(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	var ran atomic.Int32
	release := make(chan struct{})
	running := make(chan struct{})
	handle(t, svc, "work", func(context.Context, int) (int, error) {
		if ran.Add(1) == 1 {
			close(running)
			<-release
		}
		return 0, nil
	}, aegis.Concurrency(1))
	start(t, svc)
	client := newService(t, srv, "client")
	first := make(chan error, 1)
	go func() {
		_, err := call[int, int](client, "svc", "work", 1)
		first <- err
	}()
	<-running
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := aegis.Call[int, int](ctx, client, "svc", "work", 2)
	fails(t, err, aegis.ErrTimeout)
	time.Sleep(500 * time.Millisecond) // well past the deadline: the instance counts from when it noticed the request
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	// Sticky retries the call if the expired request still waits.
	if _, err := call[int, int](client, "svc", "work", 3, aegis.Sticky()); err != nil {
		t.Error(err)
	}
	if n := ran.Load(); n != 2 {
		t.Errorf("%d requests ran, want 2", n)
	}
}

func TestBlockingHandlers(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "countdown", func(ctx context.Context, n int) (int, error) { // each call waits for another to the same handler
		if n == 0 {
			return 0, nil
		}
		n, err := aegis.Call[int, int](ctx, svc, "svc", "countdown", n-1)
		return n + 1, err
	})
	var arrived sync.WaitGroup
	arrived.Add(300)
	handle(t, svc, "together", func(context.Context, int) (int, error) {
		arrived.Done()
		arrived.Wait()
		return 0, nil
	})
	fast := make(chan struct{})
	handle(t, svc, "suddenly", func(_ context.Context, n int) (int, error) { // usually fast, so that it has few workers
		if n < 0 {
			<-fast
		}
		return n, nil
	})
	start(t, svc)
	if n, err := call[int, int](svc, "svc", "countdown", 100); n != 100 || err != nil {
		t.Error(n, err)
	}
	var calls sync.WaitGroup
	for range 300 {
		calls.Go(func() {
			if _, err := call[int, int](svc, "svc", "together", 1); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()

	for n := range 500 {
		if _, err := call[int, int](svc, "svc", "suddenly", n); err != nil {
			t.Fatal(err)
		}
	}
	for range 50 {
		calls.Go(func() {
			if _, err := call[int, int](svc, "svc", "suddenly", -1); err != nil {
				t.Error(err)
			}
		})
	}
	for n := range 100 {
		if _, err := call[int, int](svc, "svc", "suddenly", n); err != nil {
			t.Error(err)
		}
	}
	close(fast)
	calls.Wait()
}

func TestLoadShedding(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc", aegis.WithConcurrency(3)), newService(t, srv, "client")
	release := make(chan struct{})
	var running, most atomic.Int32
	handle(t, svc, "m", func(context.Context, int) (int, error) {
		n := running.Add(1)
		defer running.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		<-release
		return 0, nil
	})
	start(t, svc)
	results := make(chan error, 20)
	for range 20 {
		go func() {
			_, err := call[int, int](client, "svc", "m", 1)
			results <- err
		}()
	}
	promptly(t, func() {
		for range 14 { // of 20 calls, 3 run and 3 wait
			if e := fails(t, <-results, aegis.ErrOverloaded, "rpc.svc.m", "3"); !e.NotRun {
				t.Error("NotRun = false, want true")
			}
		}
	})
	close(release)
	for range 6 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if most.Load() != 3 {
		t.Errorf("%d ran concurrently, want 3", most.Load())
	}
	if _, err := call[int, int](client, "svc", "m", 1); err != nil {
		t.Error(err)
	}
}

// hammer calls a method from several goroutines until stop is called, and checks that each answer belongs to its call. It passes
// errors to failed; stop returns the number of successful calls.
func hammer(tb testing.TB, client *aegis.Service, goroutines int, service, method string, failed func(error), opts ...aegis.CallOption) (stop func() (calls int64)) {
	var done atomic.Bool
	var n atomic.Int64
	var wg sync.WaitGroup
	for i := range goroutines {
		wg.Go(func() {
			for seq := 0; !done.Load(); seq++ {
				want := fmt.Sprintf("%d/%d", i, seq)
				got, err := call[string, string](client, service, method, want, opts...)
				if err == nil && got != want {
					err = fmt.Errorf("got %q, want %q: the answer to another call", got, want)
				}
				if err != nil {
					failed(err)
				} else {
					n.Add(1)
				}
			}
		})
	}
	stop = func() int64 {
		done.Store(true)
		wg.Wait()
		return n.Load()
	}
	tb.Cleanup(func() { stop() })
	return stop
}

// A client that sends more requests than the service can handle still gets an answer to each of them.
func TestFloodIsAnswered(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc", aegis.WithConcurrency(4))
	handle(t, svc, "m", func(context.Context, int) (int, error) {
		time.Sleep(time.Millisecond)
		return 0, nil
	})
	start(t, svc)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	const requests = 10_000
	var answers, refused atomic.Int64
	if _, err := nc.Subscribe("answers", func(m *nats.Msg) {
		if m.Header.Get("Nats-Service-Error-Code") == "429" {
			refused.Add(1)
		}
		answers.Add(1)
	}); err != nil {
		t.Fatal(err)
	}
	for range requests {
		if err := nc.PublishRequest("rpc.svc.m", "answers", []byte("1")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "each request is answered", func() bool { return answers.Load() == requests })
	if refused.Load() < requests/2 {
		t.Errorf("only %d of %d requests were rejected, want at least half", refused.Load(), requests)
	}
}

func TestMiddleware(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	var mu sync.Mutex
	var order []string
	note := func(name string) aegis.Middleware {
		return func(next aegis.HandlerFunc) aegis.HandlerFunc {
			return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
				mu.Lock()
				order = append(order, fmt.Sprintf("%s %s %s %s", name, m.Kind, m.Subject, m.Source))
				mu.Unlock()
				return next(ctx, m)
			}
		}
	}
	auth := func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			if m.Header.Get("Authorization") != "secret" {
				return nil, &aegis.Error{Code: "DENIED", Message: "no token"}
			}
			return next(ctx, m)
		}
	}
	svc := newService(t, srv, "svc", aegis.WithMiddleware(note("outer"), auth), aegis.WithMiddleware(note("inner")))
	handle(t, svc, "m", echo)
	start(t, svc)
	client := newService(t, srv, "client")
	_, err := call[string, string](client, "svc", "m", "hi")
	if e := fails(t, err, &aegis.Error{Code: "DENIED"}, "no token"); !e.NotRun {
		t.Error("NotRun = false, want true: the call did not reach the handler")
	}
	got, err := aegis.Call[string, string](aegis.WithHeader(t.Context(), "Authorization", "secret"), client, "svc", "m", "hi")
	if got != "hi" || err != nil {
		t.Error(got, err)
	}
	if want := []string{"outer rpc rpc.svc.m client", "outer rpc rpc.svc.m client", "inner rpc rpc.svc.m client"}; !reflect.DeepEqual(order, want) {
		t.Errorf("got %v", order)
	}
	careless := newService(t, srv, "careless", aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(_ context.Context, m *aegis.Message) ([]byte, error) { return next(context.Background(), m) }
	}))
	handle(t, careless, "m", echo)
	start(t, careless)
	_, err = call[string, string](client, "careless", "m", "hi")
	fails(t, err, aegis.ErrInternal, "ctx")
}

// Each log line about a message has the correlation ID that the handler sees.
func TestLogLinesHaveCorrelationID(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var logged safeBuffer
	svc := newService(t, srv, "risk", aegis.WithLogger(slog.New(slog.NewJSONHandler(&logged, nil))))
	var ids journal[string]
	fail := func(ctx context.Context) error {
		ids.add(aegis.CorrelationID(ctx))
		panic("oh")
	}
	handle(t, svc, "m", func(ctx context.Context, _ int) (int, error) { return 0, fail(ctx) })
	subscribe(t, svc, "order.*", func(ctx context.Context, _ aegis.Event[int]) error { return fail(ctx) }, aegis.Attempts(2), aegis.Backoff(1, 1))
	handleCommand(t, svc, "work", func(ctx context.Context, _ *aegis.Command[int]) (int, error) { return 0, fail(ctx) }, aegis.Attempts(2), aegis.Backoff(1, 1))
	start(t, svc)
	_, err := call[int, int](svc, "risk", "m", 1)
	fails(t, err, aegis.ErrInternal)
	publish(t, svc, "order", "created", 1, aegis.IdempotencyKey("event-1"))
	fails(t, waitError(t, send[int, int](t, svc, "risk", "work", 1, aegis.IdempotencyKey("command-1"))), aegis.ErrInternal)
	ids.wait(t, 5)
	type line struct {
		Msg, Service, Instance, Endpoint string
		ID                               string `json:"correlation_id"`
		Error                            any
	}
	eventually(t, "both dead letters are logged", func() bool { return strings.Count(logged.String(), "dead letter") == 2 })
	var about []line
	for text := range strings.Lines(logged.String()) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if l.Service != "risk" || l.Instance != svc.ID() {
			t.Errorf("wrong service or instance in the log line %s", text)
		}
		if l.Endpoint != "" {
			about = append(about, l)
		}
	}
	if len(about) != 5+2+2 { // panics, failed attempts, dead letters
		t.Errorf("%d log lines are about messages, want 9: %s", len(about), logged.String())
	}
	for _, l := range about {
		if l.Error == nil || !slices.Contains(ids.all(), l.ID) || l.Endpoint == "order.*" && l.ID != "event-1" || l.Endpoint == "work" && l.ID != "command-1" {
			t.Errorf("log line %+v has no error, or the wrong correlation ID; the handlers saw %v", l, ids.all())
		}
	}
}

func TestTracePropagation(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	const trace, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=1"
	var hops journal[string]
	// This middleware makes each handler a separate span, as the middleware of a tracer does.
	spans := aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			parent := m.Header.Get("traceparent")
			hops.add(fmt.Sprint(m.Kind, " ", parent, " ", m.Header.Get("tracestate"), " ", aegis.CorrelationID(ctx)))
			if parts := strings.Split(parent, "-"); len(parts) == 4 {
				id, _ := strconv.ParseUint(parts[2], 16, 64)
				ctx = aegis.WithHeader(ctx, "traceparent", fmt.Sprintf("%s-%s-%016x-%s", parts[0], parts[1], id+1, parts[3]))
			}
			return next(ctx, m)
		}
	})
	svc := newService(t, srv, "risk", spans)
	handle(t, svc, "m", func(ctx context.Context, n int) (int, error) {
		return n, aegis.Publish(ctx, svc, "order", "created", n)
	})
	subscribe(t, svc, "order.*", func(ctx context.Context, e aegis.Event[int]) error {
		if e.Attempt == 1 {
			return errors.New("not yet") // the second attempt must belong to the same trace
		}
		_, err := aegis.SendCommand[int, int](ctx, svc, "risk", "work", e.Data)
		return err
	}, aegis.Backoff(time.Millisecond, time.Millisecond))
	handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) {
		return aegis.Call[int, int](ctx, svc, "risk", "last", c.Data)
	})
	handle(t, svc, "last", func(_ context.Context, n int) (int, error) { return n, nil })
	start(t, svc)
	ctx := t.Context()
	for key, value := range map[string]string{"traceparent": trace, "tracestate": state, "Aegis-Correlation-Id": "order-7"} {
		ctx = aegis.WithHeader(ctx, key, value)
	}
	if _, err := aegis.Call[int, int](ctx, svc, "risk", "m", 1); err != nil {
		t.Fatal(err)
	}
	const same = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333"
	want := []string{
		"rpc " + same + "1-01 a=1 order-7", "event " + same + "2-01 a=1 order-7", "event " + same + "2-01 a=1 order-7",
		"command " + same + "3-01 a=1 order-7", "rpc " + same + "4-01 a=1 order-7",
	}
	if got := hops.wait(t, 5); !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}

// A handler that is added while Start runs the health checks is opened once, so that Stop finds nothing twice.
func TestHandlerAddedDuringStart(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	checking, release := make(chan struct{}), make(chan struct{})
	svc := newService(t, srv, "risk", aegis.WithHealthCheck("slow", func(context.Context) error {
		close(checking)
		<-release
		return nil
	}))
	started := make(chan error, 1)
	go func() { started <- svc.Start(t.Context()) }()
	<-checking
	handle(t, svc, "echo", echo)
	var got journal[int]
	subscribe(t, svc, "order.*", into(&got))
	close(release)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	client := newService(t, srv, "shop")
	if r, err := call[string, string](client, "risk", "echo", "x"); r != "x" || err != nil {
		t.Errorf("got %q, %v", r, err)
	}
	publish(t, client, "order", "created", 1)
	got.wait(t, 1)
	promptly(t, func() {
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Middleware around what is sent sees each call, publish and send once, whatever it takes to send it.
func TestCallMiddleware(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	ctx := aegis.WithHeader(t.Context(), "Aegis-Correlation-Id", "order-7")
	var seen journal[string]
	note := func(name string) aegis.Middleware {
		return func(next aegis.HandlerFunc) aegis.HandlerFunc {
			return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
				seen.add(fmt.Sprintf("%s %s %s %s %s %s", name, m.Kind, m.Subject, m.Source, m.Data, m.Header.Get("Aegis-Correlation-Id")))
				data, err := next(aegis.WithHeader(ctx, "Via", name), m)
				seen.add(fmt.Sprintf("%s %s %v", name, data, err))
				return data, err
			}
		}
	}
	var received journal[string]
	svc := newService(t, srv, "svc", aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			received.add(fmt.Sprintf("%s %s %s", m.Kind, m.Header.Get("Via"), m.Data))
			return next(ctx, m)
		}
	}))
	handle(t, svc, "m", echo)
	subscribe(t, svc, "a.b", func(context.Context, aegis.Event[string]) error { return nil })
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) { return c.Data, nil })
	start(t, svc)
	client := newService(t, srv, "client", aegis.WithCodec(aegis.JSON), aegis.WithCallMiddleware(note("outer")), aegis.WithCallMiddleware(note("inner")))
	expect := func(want ...string) {
		t.Helper()
		if got := seen.all(); !slices.Equal(got, want) {
			t.Errorf("got %q\nwant %q", got, want)
		}
		seen = journal[string]{}
	}
	if got, err := aegis.Call[string, string](ctx, client, "svc", "m", "hi"); got != "hi" || err != nil {
		t.Error(got, err)
	}
	expect(`outer call rpc.svc.m client "hi" order-7`, `inner call rpc.svc.m client "hi" order-7`, `inner "hi" <nil>`, `outer "hi" <nil>`)
	if err := aegis.Publish(ctx, client, "a", "b", "hi"); err != nil {
		t.Error(err)
	}
	expect(`outer publish events.a.b client "hi" order-7`, `inner publish events.a.b client "hi" order-7`, `inner  <nil>`, `outer  <nil>`)
	if err := aegis.PublishBatch(ctx, client, "a", "b", []string{"1", "2", "3"}); err != nil {
		t.Error(err)
	}
	expect(`outer publish events.a.b client  order-7`, `inner publish events.a.b client  order-7`, `inner  <nil>`, `outer  <nil>`)
	job := send[string, string](t, client, "svc", "work", "hi")
	if got := wait(t, job); got != "hi" {
		t.Error(got)
	}
	expect(`outer send commands.svc.work client "hi" `, `inner send commands.svc.work client "hi" `, `inner  <nil>`, `outer  <nil>`)
	want := []string{`command inner "hi"`, `event inner "1"`, `event inner "2"`, `event inner "3"`, `event inner "hi"`, `rpc inner "hi"`}
	if got := sorted(received.wait(t, 6)); !slices.Equal(got, want) {
		t.Errorf("the service has got %q, want %q", got, want)
	}
	late := newService(t, srv, "late")
	handle(t, late, "m", echo)
	starting := make(chan error)
	go func() {
		for len(seen.all()) < 2 { // the first attempt finds nobody
			time.Sleep(time.Millisecond)
		}
		starting <- late.Start(ctx)
	}()
	patient := aegis.Retry(aegis.RetryPolicy{Attempts: 10000, Backoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond})
	if _, err := aegis.Call[string, string](ctx, client, "late", "m", "hi", patient); err != nil {
		t.Error(err)
	}
	if err := <-starting; err != nil {
		t.Fatal(err)
	}
	expect(`outer call rpc.late.m client "hi" order-7`, `inner call rpc.late.m client "hi" order-7`, `inner "hi" <nil>`, `outer "hi" <nil>`)
	for _, err := range aegis.CallAll[string, string](ctx, client, "svc", "m", "hi") {
		if err != nil {
			t.Error(err)
		}
	}
	expect(`outer call rpc.svc.m client "hi" order-7`, `inner call rpc.svc.m client "hi" order-7`, `inner "hi" <nil>`, `outer "hi" <nil>`)
	// An error of the service passes as it is.
	_, err := call[string, string](client, "svc", "none", "hi")
	if e := fails(t, err, aegis.ErrUnimplemented); !e.NotRun || e.Cause != nil {
		t.Errorf("got %+v, want the error itself", e)
	}
	err = aegis.PublishBatch(ctx, client, "a", "b", []string{"1", strings.Repeat("x", 2<<20)})
	if e := fails(t, err, aegis.ErrInvalid, "max_payload"); e.Details["index"] != "1" {
		t.Errorf("got %+v, want index 1", e)
	}
}

// Middleware can answer instead of the service, refuse, change what is sent, and hide an error.
func TestCallMiddlewareDecides(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "svc")
	var events journal[string]
	handle(t, svc, "m", echo)
	handle(t, svc, "fail", func(context.Context, string) (string, error) { return "", &aegis.Error{Code: "NO_FUNDS"} })
	subscribe(t, svc, "a.b", func(_ context.Context, e aegis.Event[string]) error { events.add(e.Data); return nil })
	var commands journal[string]
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		commands.add(c.Data)
		return c.Data, nil
	})
	start(t, svc)
	ctx := t.Context()
	with := func(fn func(next aegis.HandlerFunc, ctx context.Context, m *aegis.Message) ([]byte, error)) *aegis.Service {
		return newService(t, srv, "client", aegis.WithCallMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
			return func(ctx context.Context, m *aegis.Message) ([]byte, error) { return fn(next, ctx, m) }
		}))
	}
	answering := with(func(aegis.HandlerFunc, context.Context, *aegis.Message) ([]byte, error) {
		return []byte(`"canned"`), nil
	})
	if got, err := call[string, string](answering, "nobody", "m", "hi"); got != "canned" || err != nil {
		t.Error(got, err)
	}
	if err := aegis.Publish(ctx, answering, "a", "b", "dropped"); err != nil {
		t.Error(err)
	}
	refusing := with(func(aegis.HandlerFunc, context.Context, *aegis.Message) ([]byte, error) { return nil, errors.New("no") })
	_, err := call[string, string](refusing, "svc", "m", "hi")
	if e := fails(t, err, aegis.ErrInternal, "no"); !e.NotRun {
		t.Error("NotRun = false, want true: nothing was sent")
	}
	fails(t, aegis.PublishBatch(ctx, refusing, "a", "b", []string{"dropped"}), aegis.ErrInternal, "no")
	_, err = aegis.SendCommand[string, string](ctx, refusing, "svc", "work", "dropped")
	if e := fails(t, err, aegis.ErrInternal, "no"); !e.NotRun {
		t.Error("NotRun = false, want true: nothing was sent")
	}
	changing := with(func(next aegis.HandlerFunc, ctx context.Context, m *aegis.Message) ([]byte, error) {
		changed := *m
		changed.Data = []byte(`"changed"`)
		return next(ctx, &changed)
	})
	if got, err := call[string, string](changing, "svc", "m", "hi"); got != "changed" || err != nil {
		t.Error(got, err)
	}
	publish(t, changing, "a", "b", "hi")
	send[string, string](t, changing, "svc", "work", "hi")
	if got := events.wait(t, 1); !slices.Equal(got, []string{"changed"}) {
		t.Errorf("got events %q, want only the changed one", got)
	}
	if got := commands.wait(t, 1); !slices.Equal(got, []string{"changed"}) {
		t.Errorf("got commands %q, want only the changed one", got)
	}
	// An error after a handler has run never has NotRun.
	replacing := with(func(next aegis.HandlerFunc, ctx context.Context, m *aegis.Message) ([]byte, error) {
		_, _ = next(ctx, m)
		return nil, &aegis.Error{Code: "REPLACED", NotRun: true}
	})
	for _, method := range []string{"m", "fail"} {
		_, err = call[string, string](replacing, "svc", method, "hi")
		if e := fails(t, err, &aegis.Error{Code: "REPLACED"}); e.NotRun {
			t.Errorf("%s: NotRun = true, but the handler ran", method)
		}
	}
	hiding := with(func(next aegis.HandlerFunc, ctx context.Context, m *aegis.Message) ([]byte, error) {
		if _, err := next(ctx, m); err != nil {
			return []byte(`"default"`), nil
		}
		return []byte(`"fine"`), nil
	})
	if got, err := call[string, string](hiding, "svc", "fail", "hi"); got != "default" || err != nil {
		t.Error(got, err)
	}
	careless := with(func(next aegis.HandlerFunc, _ context.Context, m *aegis.Message) ([]byte, error) {
		return next(context.Background(), m)
	})
	_, err = call[string, string](careless, "svc", "m", "hi")
	fails(t, err, aegis.ErrInternal, "ctx")
	_, err = aegis.New("x", aegis.WithCallMiddleware(nil))
	fails(t, err, aegis.ErrInvalid, "WithCallMiddleware")
}

// A logLine is a line of a logger in JSON.
type logLine struct {
	Level, Msg, Service, Instance, Endpoint, Error string
	ID                                             string `json:"correlation_id"`
	LeftOut                                        int    `json:"left_out"`
}

// logLines returns the lines whose Msg contains text.
func logLines(tb testing.TB, logged *safeBuffer, text string) (lines []logLine) {
	tb.Helper()
	for line := range strings.Lines(logged.String()) {
		var l logLine
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			tb.Fatalf("%v in %s", err, line)
		}
		if strings.Contains(l.Msg, text) {
			lines = append(lines, l)
		}
	}
	return lines
}

// Failures that nobody meant are in the log of the service where they happened, one line each.
func TestUnexpectedFailuresAreLogged(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	var logged safeBuffer
	svc := newService(t, srv, "svc", aegis.WithLogger(slog.New(slog.NewJSONHandler(&logged, nil))))
	client := newService(t, srv, "client")
	for method, fn := range map[string]func(context.Context, int) (any, error){
		"plain":  func(context.Context, int) (any, error) { return nil, errors.New("database gone") },
		"panics": func(context.Context, int) (any, error) { panic("database gone") },
		"goexit": func(context.Context, int) (any, error) { runtime.Goexit(); return nil, nil },
		"encode": func(context.Context, int) (any, error) { return make(chan int), nil },
		"large":  func(context.Context, int) (any, error) { return strings.Repeat("x", 2<<20), nil },
		"typed":  func(context.Context, int) (any, error) { return nil, &aegis.Error{Code: "NO_FUNDS"} },
		"absent": func(context.Context, int) (any, error) { return nil, aegis.ErrNotFound },
		"cancel": func(context.Context, int) (any, error) { return nil, context.Canceled },
		"fine":   func(context.Context, int) (any, error) { return 1, nil },
	} {
		handle(t, svc, method, fn)
	}
	start(t, svc)
	if l := logLines(t, &logged, "started"); len(l) != 1 || l[0].Level != "INFO" || l[0].Service != "svc" || l[0].Instance != svc.ID() {
		t.Errorf("got the lines %+v when the service has started, want one", l)
	}
	for _, method := range []string{"plain", "panics", "goexit", "encode", "large", "typed", "absent", "cancel", "fine"} {
		ctx := aegis.WithHeader(t.Context(), "Aegis-Correlation-Id", "id-"+method)
		_, _ = aegis.Call[int, any](ctx, client, "svc", method, 1)
		var own []logLine
		for _, l := range logLines(t, &logged, "") {
			if l.ID == "id-"+method {
				own = append(own, l)
			}
		}
		switch method {
		case "typed", "absent", "cancel", "fine":
			if len(own) != 0 {
				t.Errorf("%s: got the lines %+v, want none", method, own)
			}
		default:
			if len(own) != 1 || own[0].Level != "ERROR" || own[0].Endpoint != method || own[0].Error == "" {
				t.Errorf("%s: got the lines %+v, want one with the endpoint and the error", method, own)
			}
		}
	}
	if err := svc.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if l := logLines(t, &logged, "stopped"); len(l) != 1 || l[0].Level != "INFO" {
		t.Errorf("got the lines %+v when the service has stopped, want one", l)
	}
}

// A handler that fails all the time does not flood the log.
func TestLogIsBounded(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var logged safeBuffer
	svc := newService(t, srv, "svc", aegis.WithLogger(slog.New(slog.NewJSONHandler(&logged, nil))))
	client := newService(t, srv, "client")
	handle(t, svc, "fails", func(context.Context, int) (int, error) { return 0, errors.New("no") })
	handle(t, svc, "panics", func(context.Context, int) (int, error) { panic("no") })
	start(t, svc)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 500 {
				for _, method := range []string{"fails", "panics"} {
					_, err := call[int, int](client, "svc", method, 1)
					fails(t, err, aegis.ErrInternal)
				}
			}
		})
	}
	callers.Wait()
	if n := len(logLines(t, &logged, "")); n > 50 {
		t.Errorf("8,000 failures led to %d lines", n)
	}
	eventually(t, "a later failure is logged, with how many lines were left out", func() bool {
		_, _ = call[int, int](client, "svc", "fails", 1)
		lines := logLines(t, &logged, "request failed")
		return lines[len(lines)-1].LeftOut > 1000
	})
}

// After a restart of the server, a service that has not reconnected yet is not called dead.
func TestNoRespondersAfterServerRestart(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	slow := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 2 * time.Second }))
	svc := newService(t, srv, "svc", slow)
	client := newService(t, srv, "client", aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 10 * time.Millisecond })))
	handle(t, svc, "m", echo)
	start(t, svc)
	_, err := call[string, string](client, "nobody", "m", "hi")
	if fails(t, err, aegis.ErrUnavailable, "not running"); strings.Contains(err.Error(), "reconnected") {
		t.Errorf("got %v without any reconnect", err)
	}
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "both have noticed", func() bool { return svc.Stats().Connected == 0 && client.Stats().Connected == 0 })
	time.Sleep(50 * time.Millisecond) // lets the first attempts to reconnect fail
	startServer(t, samePort)
	eventually(t, "the client is connected again", func() bool { return client.Stats().Connected == 2 })
	if _, err := call[string, string](client, "svc", "m", "hi"); err != nil { // otherwise the service was faster
		fails(t, err, aegis.ErrUnavailable, "svc", "has not reconnected yet")
	}
	if got, err := call[string, string](client, "svc", "m", "hi", aegis.Sticky()); got != "hi" || err != nil {
		t.Error(got, err)
	}
}

// An answer that can't be sent because the connection is lost is logged as that.
func TestLostAnswerIsLogged(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	var logged safeBuffer
	svc := newService(t, srv, "svc", aegis.WithLogger(slog.New(slog.NewJSONHandler(&logged, nil))))
	client := newService(t, srv, "client")
	inside, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "m", func(context.Context, int) (int, error) {
		close(inside)
		<-release
		return 1, nil
	})
	start(t, svc)
	go func() { _, _ = call[int, int](client, "svc", "m", 1) }()
	<-inside
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "the service has noticed", func() bool { return svc.Stats().Connected == 0 })
	close(release)
	eventually(t, "the lost answer is logged", func() bool { return len(logLines(t, &logged, "answer was lost")) == 1 })
	if l := logLines(t, &logged, "answer was lost")[0]; !strings.Contains(l.Error, "connection") || strings.Contains(l.Error, "buffer") {
		t.Errorf("got %+v", l)
	}
}

// A question that only serves to make an error more exact is not an error if it is denied.
func TestDeniedQuestionIsNoError(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		may := func(publish ...string) *server.Permissions {
			return &server.Permissions{Publish: &server.SubjectPermission{Deny: publish}}
		}
		o.Users = []*server.User{{Username: "all"}, {Username: "shop", Permissions: may("$SRV.>")}}
	})
	var logged safeBuffer
	svc := newService(t, srv, "svc", aegis.WithNATS(nats.UserInfo("all", "")))
	client := newService(t, srv, "client", aegis.WithNATS(nats.UserInfo("shop", "")), aegis.WithLogger(slog.New(slog.NewJSONHandler(&logged, nil))))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data, nil })
	start(t, svc)
	if got := wait(t, send[int, int](t, client, "svc", "work", 7)); got != 7 {
		t.Error(got)
	}
	_, err := call[int, int](client, "nobody", "m", 1)
	fails(t, err, aegis.ErrUnavailable, "unknown")
	eventually(t, "the denial is logged", func() bool { return len(logLines(t, &logged, "NATS reports")) > 0 })
	for _, l := range logLines(t, &logged, "") {
		if l.Level == "ERROR" {
			t.Errorf("got the line %+v", l)
		}
	}
}

// The memory of a service follows use: a method that nobody calls takes little.
func TestManyMethods(t *testing.T) { // not parallel to other tests, because it measures memory
	srv := startServer(t)
	memory := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	svc := newService(t, srv, "svc")
	before := memory()
	const methods = 1000
	for n := range methods {
		handle(t, svc, fmt.Sprint("m", n), func(_ context.Context, v int) (int, error) { return v + n, nil })
	}
	start(t, svc)
	if used := (memory() - before) >> 20; used > 32 {
		t.Errorf("%d methods take %d MB, want at most 32 (the server's share included)", methods, used)
	} else {
		t.Logf("%d methods take %d MB", methods, used)
	}
	client := newService(t, srv, "client")
	for n := range methods {
		if got, err := call[int, int](client, "svc", fmt.Sprint("m", n), 1); got != n+1 || err != nil {
			t.Fatal(got, err)
		}
	}
}
