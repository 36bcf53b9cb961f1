package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

func TestServerRestartUnderLoad(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	svc, client := newService(t, srv, "svc", reconnect), newService(t, srv, "client", reconnect, aegis.WithPool(3))
	handle(t, svc, "m", echo)
	running := make(chan struct{})
	handle(t, svc, "hang", func(ctx context.Context, _ int) (int, error) {
		close(running)
		<-ctx.Done()
		return 0, ctx.Err()
	})
	start(t, svc)
	var unavailable atomic.Int64
	stop := hammer(t, client, 8, "svc", "m", func(err error) {
		if !errors.Is(err, aegis.ErrUnavailable) {
			t.Error(err)
		}
		unavailable.Add(1)
		time.Sleep(time.Millisecond)
	})
	hanging := make(chan error)
	go func() {
		_, err := call[int, int](client, "svc", "hang", 1)
		hanging <- err
	}()
	<-running
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	promptly(t, func() {
		if e := fails(t, <-hanging, aegis.ErrUnavailable, "connection was lost"); e.NotRun || e.Details["correlation_id"] == "" {
			t.Errorf("got %+v", e)
		}
	})
	eventually(t, "calls fail immediately", func() bool { return unavailable.Load() > 100 })
	again := startServer(t, samePort)
	eventually(t, "calls succeed again", func() bool {
		_, err := call[string, string](client, "svc", "m", "")
		return err == nil
	})
	eventually(t, "all connections are back", func() bool { return again.NumClients() == 5 })
	eventually(t, "calls succeed on all connections", func() bool {
		for range 30 {
			if _, err := call[string, string](client, "svc", "m", ""); err != nil {
				return false
			}
		}
		return true
	})
	stop()
}

func TestPoolSkipsLostConnection(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", echo)
	start(t, svc)
	var lost atomic.Int32
	client := newService(t, srv, "client", aegis.WithPool(3), aegis.WithNATS(
		nats.CustomReconnectDelay(func(int) time.Duration { return time.Hour }),
		nats.DisconnectErrHandler(func(*nats.Conn, error) { lost.Add(1) })))
	id, err := client.Conn().GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.DisconnectClientByID(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the user's disconnect handler is called", func() bool { return lost.Load() == 1 })
	for range 30 {
		if _, err := call[string, string](client, "svc", "m", ""); err != nil {
			t.Error(err)
		}
	}
}

// A responder sends some answers twice and some after their call has ended. Such an answer must never be taken for the answer to
// another call.
func TestLateAnswersAreDiscarded(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	type held struct {
		*nats.Msg
		since time.Time
	}
	var old []held // requests that were not answered in time; only the subscription's goroutine uses it
	if _, err := nc.Subscribe("rpc.svc.m", func(m *nats.Msg) {
		for len(old) > 0 && time.Since(old[0].since) > 40*time.Millisecond {
			_ = old[0].Respond(old[0].Data)
			_ = old[0].Respond(old[0].Data)
			old = old[1:]
		}
		if rand.IntN(4) == 0 {
			old = append(old, held{m, time.Now()})
			return
		}
		_ = m.Respond(m.Data)
		_ = m.Respond(m.Data)
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	client := newService(t, srv, "client", aegis.WithPool(1), aegis.WithTimeout(20*time.Millisecond))
	var late atomic.Int64
	stop := hammer(t, client, 4, "svc", "m", func(err error) {
		if !errors.Is(err, aegis.ErrTimeout) {
			t.Error(err)
		}
		late.Add(1)
	})
	eventually(t, "many calls have timed out", func() bool { return late.Load() > 100 })
	if stop() == 0 {
		t.Error("no call was answered in time")
	}
}

func TestConcurrentCalls(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "m", func(_ context.Context, s string) (string, error) {
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
		return s, nil
	})
	start(t, svc)
	var polls atomic.Int64
	stop := hammer(t, client, 500, "svc", "m", func(err error) { t.Error(err) })
	eventually(t, "about 200 ms have passed", func() bool { return polls.Add(1) > 200 })
	if n := stop(); n < 500 {
		t.Errorf("only %d calls succeeded, want at least 500", n)
	}
}

// A request that cannot be sent fails with its own error, and does not affect the other requests that are sent at the same time.
func TestInvalidRequestsAmongConcurrentCalls(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) { o.MaxPayload = 32 << 10 })
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "take", func(_ context.Context, b []byte) (int, error) { return len(b), nil })
	start(t, svc)
	promptly(t, func() {
		var calls sync.WaitGroup
		for i := range 64 {
			calls.Go(func() {
				switch i % 4 {
				case 0:
					_, err := call[[]byte, int](client, "svc", "take", make([]byte, 40<<10))
					fails(t, err, aegis.ErrInvalid, "32768")
				case 1:
					_, err := aegis.Call[[]byte, int](aegis.WithHeader(t.Context(), "bad key", "v"), client, "svc", "take", nil)
					fails(t, err, aegis.ErrInvalid, "bad key")
				default:
					if n, err := call[[]byte, int](client, "svc", "take", make([]byte, 10<<10)); n != 10<<10 || err != nil {
						t.Error(n, err)
					}
				}
			})
		}
		calls.Wait()
	})
}

// A server that reads nothing from its connections any more must not block calls or Stop for long after their deadlines.
func TestStalledConnection(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	p := startProxy(t, srv)
	svc := newService(t, srv, "svc")
	handle(t, svc, "take", func(_ context.Context, b []byte) (int, error) { return len(b), nil })
	start(t, svc)
	client := newService(t, srv, "client", aegis.WithURL("nats://"+p.address))
	if _, err := call[[]byte, int](client, "svc", "take", nil); err != nil {
		t.Fatal(err)
	}
	p.stall()
	begin := time.Now()
	var calls sync.WaitGroup
	for range 100 {
		calls.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			_, err := aegis.Call[[]byte, int](ctx, client, "svc", "take", make([]byte, 500<<10))
			if !errors.Is(err, aegis.ErrTimeout) && !errors.Is(err, aegis.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
		})
	}
	calls.Wait()
	// On each of the two connections, nats.go blocks calls for a flush and a connect, 2 s each.
	if took := time.Since(begin); took > 8*time.Second {
		t.Errorf("calls with a timeout of 0.5 s took %v, want at most 8 s", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	begin = time.Now()
	fails(t, client.Stop(ctx), aegis.ErrUnavailable)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("Stop with a timeout of 1 s took %v, want at most 5 s", took)
	}
}

// Many late answers to calls that have timed out must leave room for the answer to the next call.
func TestLateAnswersDoNotDisplaceNextAnswer(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	requests := make(chan *nats.Msg, 100)
	if _, err := nc.ChanSubscribe("rpc.svc.m", requests); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	client := newService(t, srv, "client", aegis.WithPool(1))
	for len(requests) < 20 { // some calls may time out before they are sent
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_, err := aegis.Call[int, int](ctx, client, "svc", "m", 1)
		cancel()
		fails(t, err, aegis.ErrTimeout)
	}
	result := make(chan error)
	go func() {
		n, err := call[int, int](client, "svc", "m", 7)
		if err == nil && n != 7 {
			err = fmt.Errorf("got %d, want 7", n)
		}
		result <- err
	}()
	for last := false; !last; {
		m := <-requests
		last = m.Data[0] == 7
		for range 3 {
			_ = m.Respond(m.Data)
		}
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// flaky returns a handler that answers its first calls with 0 and the error of how, and later calls with 7. The counter called
// counts the calls.
func flaky(failures int32, how func() error) (fn func(context.Context, int) (int, error), called *atomic.Int32) {
	called = new(atomic.Int32)
	return func(context.Context, int) (int, error) {
		if called.Add(1) <= failures {
			return 0, how()
		}
		return 7, nil
	}, called
}

// If ctx ends during an attempt, the error still reports the failure of the attempt before it.
func TestTimeoutReportsEarlierFailure(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	client := newService(t, srv, "client")
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sent := func() int64 {
		v, err := srv.Varz(nil)
		if err != nil {
			t.Error(err)
			return 0
		}
		return v.InMsgs
	}
	before := sent()
	ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		_, err := aegis.Call[int, int](ctx, client, "never", "m", 1, aegis.Sticky())
		result <- err
	}()
	eventually(t, "some attempts have been made", func() bool { return sent() > before+8 })
	// This subscriber never answers. So the question why there are no responders is still open when ctx ends.
	if _, err := nc.Subscribe("$SRV.INFO.never", func(*nats.Msg) {}); err != nil {
		t.Fatal(err)
	}
	if e := fails(t, <-result, aegis.ErrTimeout, "never is not running"); !e.NotRun {
		t.Errorf("got %+v", e)
	}
}

func TestRetry(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	policy := aegis.RetryPolicy{Attempts: 4, Backoff: time.Millisecond, AttemptTimeout: 2 * time.Second} // also for a busy machine

	// A call that ran is not retried, whatever its error says.
	fn, called := flaky(99, func() error { return &aegis.Error{Code: "UNAVAILABLE", NotRun: true} })
	handle(t, svc, "ran", fn)
	slow, slowCalled := flaky(1, func() error { time.Sleep(2200 * time.Millisecond); return nil })
	handle(t, svc, "slow", slow)
	start(t, svc)
	for _, opts := range [][]aegis.CallOption{{aegis.Retry(policy)}, {aegis.Sticky()}, {aegis.Idempotent(), aegis.Retry(policy)}} {
		called.Store(0)
		_, err := call[int, int](client, "svc", "ran", 1, opts...)
		if e := fails(t, err, aegis.ErrUnavailable); e.NotRun || called.Load() != 1 {
			t.Errorf("called %d times, %+v", called.Load(), e)
		}
	}

	// Only an idempotent call is retried after AttemptTimeout without an answer. Other calls go on waiting.
	if got, err := call[int, int](client, "svc", "slow", 1, aegis.Retry(policy)); got != 0 || err != nil || slowCalled.Load() != 1 {
		t.Errorf("got %d, %v after %d calls", got, err, slowCalled.Load())
	}
	slowCalled.Store(0)
	if got, err := call[int, int](client, "svc", "slow", 1, aegis.Idempotent(), aegis.Retry(policy)); got != 7 || err != nil || slowCalled.Load() != 2 {
		t.Errorf("got %d, %v after %d calls", got, err, slowCalled.Load())
	}

	// A call that did not reach a handler is retried.
	started := time.Now()
	_, err := call[int, int](client, "late", "m", 1, aegis.Retry(policy))
	if e := fails(t, err, aegis.ErrUnavailable, "late"); !e.NotRun {
		t.Error("NotRun = false, want true")
	}
	if time.Since(started) > 2*time.Second {
		t.Errorf("retrying took %v, want at most 2 s", time.Since(started))
	}
	result := make(chan error)
	go func() {
		_, err := call[int, int](client, "late", "m", 1, aegis.Sticky())
		result <- err
	}()
	late := newService(t, srv, "late")
	ok, _ := flaky(0, nil)
	handle(t, late, "m", ok)
	start(t, late)
	if err := <-result; err != nil {
		t.Error(err)
	}

	// When a call gives up, its error says why, and that nothing ran unless an attempt was still unanswered.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = aegis.Call[int, int](ctx, client, "never", "m", 1, aegis.Sticky())
	if e := fails(t, err, aegis.ErrTimeout, "never is not running"); !e.NotRun && strings.HasPrefix(e.Message, "gave up") || !errors.Is(err, aegis.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %+v", e)
	}

	// If an earlier attempt may have run, NotRun is false, even if the last attempt did not run.
	once := newService(t, srv, "once")
	release := make(chan struct{})
	defer close(release)
	handle(t, once, "m", func(context.Context, int) (int, error) {
		go func() { _ = once.Stop(context.Background()) }()
		<-release
		return 0, nil
	})
	start(t, once)
	_, err = call[int, int](client, "once", "m", 1, aegis.Idempotent(), aegis.Retry(aegis.RetryPolicy{Attempts: 2, Backoff: time.Millisecond, AttemptTimeout: 500 * time.Millisecond}))
	if e := fails(t, err, aegis.ErrUnavailable, "once is not running"); e.NotRun {
		t.Error("NotRun = true, want false: the first attempt ran")
	}
}

// limitSubscriptions makes the server refuse the subscriptions of a connection beyond most.
func limitSubscriptions(most int) func(*server.Options) {
	return func(o *server.Options) { o.MaxSubs = most }
}

// The server may refuse subscriptions for answers, and does not say which. The calls that it refused fail at once. Those within the
// limit succeed, and so do all calls afterwards.
func TestRefusedReplySubscriptions(t *testing.T) {
	t.Parallel()
	const limit, burst = 20, 60
	srv := startServer(t, limitSubscriptions(limit))
	svc := newService(t, srv, "svc", aegis.WithPool(1)) // has 6 subscriptions
	release := make(chan struct{})
	var ran atomic.Int32
	handle(t, svc, "slow", func(_ context.Context, n int) (int, error) {
		ran.Add(1)
		<-release
		return n, nil
	})
	handle(t, svc, "fast", func(_ context.Context, n int) (int, error) { return n, nil })
	start(t, svc)
	client := newService(t, srv, "client", aegis.WithPool(1))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	failures, answers := make(chan error, burst), make(chan int, burst)
	for n := range burst {
		go func() {
			got, err := aegis.Call[int, int](ctx, client, "svc", "slow", n)
			if err == nil && got == n {
				answers <- got
			} else {
				failures <- err
			}
		}()
	}
	promptly(t, func() {
		for range burst - limit {
			e := fails(t, <-failures, aegis.ErrOverloaded, "max_subscriptions")
			if e.NotRun && ran.Load() == burst {
				t.Error("NotRun is true, but all handlers have run")
			}
		}
	})
	for range 30 { // while the limit is used up
		_, err := aegis.Call[int, int](ctx, client, "svc", "fast", 1)
		fails(t, err, aegis.ErrOverloaded, "max_subscriptions")
	}
	close(release)
	for range limit {
		select {
		case <-answers:
		case err := <-failures:
			t.Fatalf("a call within the limit failed: %v", err)
		}
	}
	promptly(t, func() {
		for n := range 30 {
			if got, err := aegis.Call[int, int](ctx, client, "svc", "fast", n); got != n || err != nil {
				t.Fatal(got, err)
			}
		}
		var all sync.WaitGroup
		for n := range limit {
			all.Go(func() {
				if got, err := aegis.Call[int, int](ctx, client, "svc", "fast", n); got != n || err != nil {
					t.Error(got, err)
				}
			})
		}
		all.Wait()
	})
}

// Whatever else makes subscriptions says so, too, if the server refuses them.
func TestRefusedSubscriptions(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t), limitSubscriptions(12))
	svc := newService(t, srv, "svc", aegis.WithPool(1))
	for n := range 10 {
		handle(t, svc, fmt.Sprint("m", n), echo)
	}
	fails(t, svc.Start(t.Context()), aegis.ErrOverloaded, "max_subscriptions")

	small := newService(t, srv, "small", aegis.WithPool(1))
	handle(t, small, "m", echo)
	start(t, small)
	failures := 0
	for n := range 10 {
		if err := aegis.Handle(small, fmt.Sprint("m", n), echo); err != nil {
			fails(t, err, aegis.ErrOverloaded, "max_subscriptions")
			failures++
		}
	}
	if failures == 0 {
		t.Error("no Handle failed, although the server allows 12 subscriptions")
	}

	// With no subscription left, nothing waits for its timeout.
	client := newService(t, srv, "client", aegis.WithPool(1))
	for range 12 {
		if _, err := client.Conn().SubscribeSync("used.up"); err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	promptly(t, func() {
		fails(t, aegis.Publish(ctx, client, "a", "b", "c"), aegis.ErrOverloaded, "max_subscriptions")
	})
	promptly(t, func() {
		fails(t, aegis.PublishBatch(ctx, client, "a", "b", []string{"c", "d"}), aegis.ErrOverloaded, "max_subscriptions")
	})
	promptly(t, func() {
		_, err := client.Dependencies(ctx)
		fails(t, err, aegis.ErrOverloaded, "max_subscriptions")
	})
}

// A stream over the subjects of calls, such as an audit log, acknowledges each request to the caller before the handler can answer.
// That is no answer.
func TestStreamOverCalls(t *testing.T) {
	t.Parallel()
	type ack struct { // looks like the acknowledgement of a stream
		Stream string `json:"stream"`
		Seq    uint64 `json:"seq"`
	}
	for name, config := range map[string]jetstream.StreamConfig{
		"audit":    {},
		"full":     {MaxMsgs: 1, Discard: jetstream.DiscardNew}, // refuses all but the first
		"no ack":   {NoAck: true},
		"too long": {MaxMsgSize: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			config.Name, config.Subjects = "AUDIT", []string{"rpc.>"}
			if _, err := manage(t, srv).CreateStream(t.Context(), config); err != nil {
				t.Fatal(err)
			}
			svc := newService(t, srv, "orders", aegis.WithFailover(aegis.Aggressive))
			handle(t, svc, "create", createOrder)
			handle(t, svc, "refuse", func(context.Context, int) (int, error) { return 0, &aegis.Error{Code: "NO_FUNDS"} })
			handle(t, svc, "later", func(ctx context.Context, n int) (any, error) {
				time.Sleep(20 * time.Millisecond)
				return map[string]any{"n": "v"}, nil
			})
			handle(t, svc, "ack", func(_ context.Context, a ack) (ack, error) { return a, nil })
			handle(t, svc, "lead", echo, aegis.Exclusive())
			var events journal[string]
			subscribe(t, svc, "a.b", into(&events))
			start(t, svc)
			eventually(t, "the service has a leader", svc.IsLeader)
			for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
				client := newService(t, srv, "client", aegis.WithCodec(codec))
				for _, opts := range [][]aegis.CallOption{nil, {aegis.Idempotent()}, {aegis.ToInstance(svc.ID())}, {aegis.Balance(aegis.Random)}} {
					if got, err := call[Order, Receipt](client, "orders", "create", Order{SKU: "x", Qty: 1}, opts...); got.ID != "x-1" || err != nil {
						t.Error(got, err)
					}
					_, err := call[int, int](client, "orders", "refuse", 1, opts...)
					fails(t, err, &aegis.Error{Code: "NO_FUNDS"})
				}
				if got, err := call[string, string](client, "orders", "lead", "hi", aegis.Sticky()); got != "hi" || err != nil {
					t.Error(got, err)
				}
				if got, err := call[int, any](client, "orders", "later", 1); fmt.Sprint(got) != "map[n:v]" || err != nil {
					t.Error(got, err)
				}
				if got, err := call[int, aegis.Raw](client, "orders", "later", 1); err != nil {
					t.Error(err)
				} else if v := map[string]string{}; got.Decode(&v) != nil || v["n"] != "v" {
					t.Error(v)
				}
				for _, a := range []ack{{"AUDIT", 1}, {"", 0}, {"x", 1 << 40}} {
					if got, err := call[ack, ack](client, "orders", "ack", a); got != a || err != nil {
						t.Errorf("got %v and error %v, want %v", got, err, a)
					}
				}
				publish(t, client, "a", "b", "c")
			}
			events.wait(t, 2)
			client := newService(t, srv, "client")
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			_, err := aegis.Call[int, int](ctx, client, "nobody", "m", 1)
			fails(t, err, aegis.ErrTimeout)
		})
	}
}

// A stream that takes the questions of the nats tool does not confuse the explanation why nobody responds.
func TestStreamOverSurveys(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	if _, err := manage(t, srv).CreateStream(t.Context(), jetstream.StreamConfig{Name: "ALL", Subjects: []string{"$SRV.>"}}); err != nil {
		t.Skip("the server does not allow such a stream:", err)
	}
	svc, client := newService(t, srv, "orders"), newService(t, srv, "client")
	handle(t, svc, "m", echo)
	start(t, svc)
	_, err := call[string, string](client, "orders", "none", "hi")
	fails(t, err, aegis.ErrUnimplemented)
	_, err = call[string, string](client, "nobody", "m", "hi")
	fails(t, err, aegis.ErrUnavailable)
}

// Responders without a queue group all answer each request. Every call gets the first answer to its own request.
func TestSecondAnswers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ responders, answers, calls, callers int }{
		"two responders": {2, 1, 20000, 50},
		"many answers":   {1, 50, 2000, 20},
		"one caller":     {3, 2, 5000, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t)
			for range test.responders {
				nc, err := nats.Connect(srv.ClientURL())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(nc.Close)
				if _, err := nc.Subscribe("rpc.plain.get", func(m *nats.Msg) {
					for range test.answers {
						_ = m.Respond(m.Data)
					}
				}); err != nil {
					t.Fatal(err)
				}
				if err := nc.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			client := newService(t, srv, "client", aegis.WithPool(1), aegis.WithTimeout(10*time.Second))
			var next atomic.Int64
			var callers sync.WaitGroup
			for range test.callers {
				callers.Go(func() {
					for n := next.Add(1); n <= int64(test.calls); n = next.Add(1) {
						if got, err := call[int64, int64](client, "plain", "get", n); got != n || err != nil {
							t.Errorf("call %d: got %d and error %v", n, got, err)
							return
						}
					}
				})
			}
			callers.Wait()
		})
	}
}
