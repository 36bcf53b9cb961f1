package aegis_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// embeddedServer starts a NATS server with JetStream in this process, so that each example runs without any setup. Your program
// passes the URL of its own NATS server to WithURL instead.
func embeddedServer() (url string, stop func()) {
	dir, err := os.MkdirTemp("", "nats-*")
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: dir, NoLog: true, NoSigs: true})
	if err != nil {
		log.Fatal(err)
	}
	srv.Start()
	if !srv.ReadyForConnections(10 * time.Second) {
		log.Fatal("the NATS server did not start within 10 s")
	}
	return srv.ClientURL(), func() { srv.Shutdown(); srv.WaitForShutdown(); os.RemoveAll(dir) }
}

// This example starts an order service and calls it from another service. The first call succeeds; the second one returns the
// error of the handler.
func Example() {
	type Order struct {
		SKU string `json:"sku"`
		Qty int    `json:"qty"`
	}
	type Receipt struct {
		ID    string  `json:"id"`
		Total float64 `json:"total"`
	}
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	orders, err := aegis.New("order-service", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer orders.Stop(ctx)
	err = aegis.Handle(orders, "create_order", func(_ context.Context, o Order) (Receipt, error) {
		if o.Qty <= 0 {
			return Receipt{}, &aegis.Error{Code: "BAD_QUANTITY", Message: fmt.Sprintf("qty is %d", o.Qty)}
		}
		return Receipt{ID: "1-" + o.SKU, Total: 9.5 * float64(o.Qty)}, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := orders.Start(ctx); err != nil {
		log.Fatal(err)
	}

	web, err := aegis.New("web", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer web.Stop(ctx)
	receipt, err := aegis.Call[Order, Receipt](ctx, web, "order-service", "create_order", Order{SKU: "AAPL", Qty: 2})
	fmt.Println(receipt, err)
	_, err = aegis.Call[Order, Receipt](ctx, web, "order-service", "create_order", Order{SKU: "AAPL"})
	fmt.Println(err)
	// Output:
	// {1-AAPL 19} <nil>
	// order-service: BAD_QUANTITY: qty is 0
}

// Any NATS client can call a handler. A request in JSON is answered in JSON.
func ExampleHandle() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	svc, err := aegis.New("greeter", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	err = aegis.Handle(svc, "greet", func(_ context.Context, in struct {
		Name string `json:"name"`
	}) (string, error) {
		return "hello " + in.Name, nil
	}, aegis.Concurrency(100))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}

	nc, err := nats.Connect(url) // a plain NATS client, without aegis
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	answer, err := nc.Request("rpc.greeter.greet", []byte(`{"name":"Ada"}`), time.Second)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(answer.Data))
	// Output: "hello Ada"
}

// Compare errors with errors.Is. If NotRun is true, the request did not reach a handler, so it is safe to retry.
func ExampleError() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	_, err = aegis.Call[string, string](ctx, client, "nobody", "hello", "hi")
	var e *aegis.Error
	fmt.Println(errors.Is(err, aegis.ErrUnavailable), errors.As(err, &e) && e.NotRun)
	fmt.Println(err)
	// Output:
	// true true
	// UNAVAILABLE: no responders on rpc.nobody.hello: nobody is not running
}

// Retry sends a call again if it certainly did not reach a handler. Here, the service starts a moment later than its caller.
func ExampleRetry() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	_, err = aegis.Call[int, int](ctx, client, "doubler", "double", 21)
	var e *aegis.Error
	fmt.Println(errors.Is(err, aegis.ErrUnavailable), errors.As(err, &e) && e.NotRun)

	svc, err := aegis.New("doubler", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	err = aegis.Handle(svc, "double", func(_ context.Context, n int) (int, error) { return 2 * n, nil })
	if err != nil {
		log.Fatal(err)
	}
	started := make(chan error)
	time.AfterFunc(100*time.Millisecond, func() { started <- svc.Start(ctx) }) // while the caller tries
	policy := aegis.RetryPolicy{Attempts: 100, Backoff: 10 * time.Millisecond, MaxBackoff: 100 * time.Millisecond}
	fmt.Println(aegis.Call[int, int](ctx, client, "doubler", "double", 21, aegis.Retry(policy)))
	if err := <-started; err != nil {
		log.Fatal(err)
	}
	// Output:
	// true true
	// 42 <nil>
}

// Idempotent says that it does no harm if the handler runs twice. Then a call is sent again when its answer is missing.
func ExampleIdempotent() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("prices", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	var runs atomic.Int32
	err = aegis.Handle(svc, "get", func(_ context.Context, symbol string) (string, error) {
		run := runs.Add(1)
		if run == 1 {
			time.Sleep(time.Second) // the first time, the answer does not come in time
		}
		return fmt.Sprintf("%s: 190.5, at run %d", symbol, run), nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	retry := aegis.Retry(aegis.RetryPolicy{AttemptTimeout: 200 * time.Millisecond})
	fmt.Println(aegis.Call[string, string](ctx, svc, "prices", "get", "AAPL", aegis.Idempotent(), retry))
	// Output: AAPL: 190.5, at run 2 <nil>
}

// Sticky retries a call that did not reach a handler until ctx ends: here, the service starts only after the call. To retry calls
// that may already have run as well, add Idempotent.
func ExampleSticky() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		fmt.Println(aegis.Call[int, int](ctx, client, "doubler", "double", 21, aegis.Sticky()))
	}()

	svc, err := aegis.New("doubler", aegis.WithURL(url)) // the service starts while the call waits
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	if err := aegis.Handle(svc, "double", func(_ context.Context, n int) (int, error) { return 2 * n, nil }); err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	<-done
	// Output: 42 <nil>
}

// CallAll calls every instance, here to flush a cache everywhere, and tells which instance answered what.
func ExampleCallAll() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, id := range []string{"prices-1", "prices-2", "prices-3"} {
		s, err := aegis.New("prices", aegis.WithURL(url), aegis.WithID(id))
		if err != nil {
			log.Fatal(err)
		}
		defer s.Stop(ctx)
		err = aegis.Handle(s, "flush", func(_ context.Context, sku string) (int, error) {
			if id == "prices-2" {
				return 0, &aegis.Error{Code: "BUSY", Message: "try later"}
			}
			return len(sku), nil
		})
		if err != nil {
			log.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)

	results := map[string]string{} // they come in any order
	for a, err := range aegis.CallAll[string, int](ctx, client, "prices", "flush", "AAPL") {
		results[a.Instance] = fmt.Sprint(a.Data, " flushed")
		if err != nil {
			results[a.Instance] = err.Error()
		}
	}
	for _, id := range slices.Sorted(maps.Keys(results)) {
		fmt.Println(id, results[id])
	}
	// Output:
	// prices-1 4 flushed
	// prices-2 prices: BUSY: try later
	// prices-3 4 flushed
}

// Balance chooses the instance to which a call goes. Without it, NATS does that, at random.
func ExampleBalance() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var svc *aegis.Service
	for _, id := range []string{"east", "west"} {
		var err error
		if svc, err = aegis.New("prices", aegis.WithURL(url), aegis.WithID(id)); err != nil {
			log.Fatal(err)
		}
		defer svc.Stop(ctx)
		err = aegis.Handle(svc, "who", func(context.Context, string) (string, error) { return id, nil })
		if err != nil {
			log.Fatal(err)
		}
		if err := svc.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	counts := map[string]int{}
	for range 100 {
		who, err := aegis.Call[string, string](ctx, svc, "prices", "who", "", aegis.Balance(aegis.RoundRobin))
		if err != nil {
			log.Fatal(err)
		}
		counts[who]++
	}
	fmt.Println(counts)
	// Output: map[east:50 west:50]
}

// ToInstance addresses a call to one instance.
func ExampleToInstance() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, id := range []string{"cache-east", "cache-west"} {
		svc, err := aegis.New("cache", aegis.WithURL(url), aegis.WithID(id))
		if err != nil {
			log.Fatal(err)
		}
		defer svc.Stop(ctx)
		err = aegis.Handle(svc, "flush", func(context.Context, string) (string, error) { return "flushed " + id, nil })
		if err != nil {
			log.Fatal(err)
		}
		if err := svc.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	fmt.Println(aegis.Call[string, string](ctx, client, "cache", "flush", "prices", aegis.ToInstance("cache-west")))
	_, err = aegis.Call[string, string](ctx, client, "cache", "flush", "prices", aegis.ToInstance("cache-north"))
	fmt.Println(errors.Is(err, aegis.ErrUnavailable))
	// Output:
	// flushed cache-west <nil>
	// true
}

// Concurrency limits how many requests a handler works on at once. As many again wait. The rest are refused at once, so that
// callers can go elsewhere.
func ExampleConcurrency() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("reports", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	finish := make(chan struct{})
	err = aegis.Handle(svc, "make", func(_ context.Context, name string) (string, error) {
		<-finish
		return name, nil
	}, aegis.Concurrency(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	results := make(chan error, 3)
	for range 3 {
		go func() {
			_, err := aegis.Call[string, string](ctx, svc, "reports", "make", "daily")
			results <- err
		}()
	}
	fmt.Println(errors.Is(<-results, aegis.ErrOverloaded)) // one runs, one waits
	close(finish)
	fmt.Println(<-results, <-results)
	// Output:
	// true
	// <nil> <nil>
}

// A circuit breaker refuses calls to a service that has failed several times in a row, without sending them.
func ExampleWithBreaker() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := aegis.New("client", aegis.WithURL(url), aegis.WithBreaker(aegis.BreakerPolicy{Failures: 2, Cooldown: time.Minute}))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	for range 3 {
		_, err := aegis.Call[int, int](ctx, client, "nobody", "double", 21)
		fmt.Println(errors.Is(err, aegis.ErrUnavailable), errors.Is(err, aegis.ErrCircuitOpen))
	}
	// Output:
	// true false
	// true false
	// false true
}

// WithTimeout bounds the calls whose ctx has no deadline. The deadline travels with a call and ends the ctx of its handler.
func ExampleWithTimeout() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	svc, err := aegis.New("risk", aegis.WithURL(url), aegis.WithTimeout(100*time.Millisecond))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	ended := make(chan error, 1)
	err = aegis.Handle(svc, "check", func(ctx context.Context, qty int) (bool, error) {
		<-ctx.Done() // a query that takes too long
		ended <- ctx.Err()
		return false, ctx.Err()
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	_, err = aegis.Call[int, bool](ctx, svc, "risk", "check", 10)
	fmt.Println(errors.Is(err, aegis.ErrTimeout))
	fmt.Println(<-ended)
	// Output:
	// true
	// context deadline exceeded
}

// WithHeader adds a header to a call, and Headers returns it in the handler, which passes it on if it wants. The correlation id goes
// along by itself.
func ExampleWithHeader() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("orders", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	var ids []string
	err = aegis.Handle(svc, "check", func(ctx context.Context, order string) (string, error) {
		ids = append(ids, aegis.CorrelationID(ctx))
		return order + " for " + aegis.Headers(ctx).Get("Tenant"), nil
	})
	if err != nil {
		log.Fatal(err)
	}
	err = aegis.Handle(svc, "create", func(ctx context.Context, order string) (string, error) {
		ids = append(ids, aegis.CorrelationID(ctx))
		ctx = aegis.WithHeader(ctx, "Tenant", aegis.Headers(ctx).Get("Tenant"))
		return aegis.Call[string, string](ctx, svc, "orders", "check", order)
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(aegis.Call[string, string](aegis.WithHeader(ctx, "Tenant", "acme"), svc, "orders", "create", "1-AAPL"))
	fmt.Println(ids[0] != "" && ids[0] == ids[1])
	// Output:
	// 1-AAPL for acme <nil>
	// true
}

// Middleware runs before the handler of every message. This one requires a token, which the caller sends in a header.
func ExampleWithMiddleware() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	auth := func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			if m.Header.Get("Authorization") != "secret" {
				return nil, &aegis.Error{Code: "DENIED", Message: "no token from " + m.Source}
			}
			return next(ctx, m)
		}
	}
	svc, err := aegis.New("vault", aegis.WithURL(url), aegis.WithMiddleware(auth))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	if err := aegis.Handle(svc, "open", func(context.Context, string) (string, error) { return "gold", nil }); err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}

	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	_, err = aegis.Call[string, string](ctx, client, "vault", "open", "sesame")
	fmt.Println(err)
	fmt.Println(aegis.Call[string, string](aegis.WithHeader(ctx, "Authorization", "secret"), client, "vault", "open", "sesame"))
	// Output:
	// vault: DENIED: no token from client
	// gold <nil>
}

// Middleware around what is sent sees each call, event and command of a service. This one keeps an audit log, and adds a token.
func ExampleWithCallMiddleware() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	vault, err := aegis.New("vault", aegis.WithURL(url), aegis.WithID("vault-1"))
	if err != nil {
		log.Fatal(err)
	}
	defer vault.Stop(ctx)
	err = aegis.Handle(vault, "open", func(ctx context.Context, word string) (string, error) {
		if aegis.Headers(ctx).Get("Authorization") != "secret" {
			return "", &aegis.Error{Code: "DENIED", Message: "no token"}
		}
		return "gold", nil
	})
	if err != nil {
		log.Fatal(err)
	}
	err = aegis.Handle(vault, "shut", func(context.Context, string) (string, error) {
		return "", &aegis.Error{Code: "DENIED", Message: "the vault stays open"}
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := vault.Start(ctx); err != nil {
		log.Fatal(err)
	}

	audit := func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			answer, err := next(aegis.WithHeader(ctx, "Authorization", "secret"), m)
			fmt.Printf("%s %s %s: answer %q, error %v\n", m.Kind, m.Subject, m.Data, answer, err)
			return answer, err
		}
	}
	client, err := aegis.New("client", aegis.WithURL(url), aegis.WithCodec(aegis.JSON), aegis.WithCallMiddleware(audit))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	_, _ = aegis.Call[string, string](ctx, client, "vault", "open", "sesame")
	_, _ = aegis.Call[string, string](ctx, client, "vault", "shut", "sesame")
	_ = aegis.Publish(ctx, client, "vault", "opened", "sesame")
	// Output:
	// call rpc.vault.open "sesame": answer "\"gold\"", error <nil>
	// call rpc.vault.shut "sesame": answer "", error vault: DENIED: the vault stays open
	// publish events.vault.opened "sesame": answer "", error <nil>
}

// With WithCodec(JSON), a service sends JSON, for handlers and clients that do not read MessagePack. It understands both in any case.
func ExampleWithCodec() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nc, err := nats.Connect(url) // a plain NATS client, without aegis
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	_, err = nc.Subscribe("rpc.prices.get", func(m *nats.Msg) {
		fmt.Println(string(m.Data))
		_ = m.Respond([]byte("190.5"))
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := nc.Flush(); err != nil { // from now on, the server has the subscription
		log.Fatal(err)
	}
	client, err := aegis.New("client", aegis.WithURL(url), aegis.WithCodec(aegis.JSON))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	request := map[string]string{"symbol": "AAPL"}
	fmt.Println(aegis.Call[map[string]string, float64](ctx, client, "prices", "get", request))
	// Output:
	// {"symbol":"AAPL"}
	// 190.5 <nil>
}

// With WithWireHeaders, a handler that does not use aegis can read the deadline of a call, its caller and its correlation id. Calls
// to another account need it too.
func ExampleWithWireHeaders() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nc, err := nats.Connect(url)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()
	_, err = nc.Subscribe("rpc.prices.get", func(m *nats.Msg) {
		left, err := time.ParseDuration(m.Header.Get("Aegis-Timeout"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(m.Header.Get("Aegis-Source"), left > 9*time.Second, m.Header.Get("Aegis-Correlation-Id") != "")
		_ = m.Respond([]byte("190.5"))
	})
	if err != nil {
		log.Fatal(err)
	}
	client, err := aegis.New("client", aegis.WithURL(url), aegis.WithWireHeaders())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	if err := nc.Flush(); err != nil { // from now on, the server has the subscription
		log.Fatal(err)
	}
	fmt.Println(aegis.Call[string, float64](ctx, client, "prices", "get", "AAPL"))
	// Output:
	// client true true
	// 190.5 <nil>
}

// Events are stored in JetStream. Every service that subscribes receives each event, and the instances of a service share the
// events among them.
func ExampleSubscribe() {
	type Payment struct {
		Order  string  `json:"order"`
		Amount float64 `json:"amount"`
	}
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	shipping, err := aegis.New("shipping", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer shipping.Stop(ctx)
	handled := make(chan string, 1)
	err = aegis.Subscribe(shipping, "payment.*", func(_ context.Context, e aegis.Event[Payment]) error {
		handled <- fmt.Sprintf("%s %s from %s: %v", e.Domain, e.Type, e.Source, e.Data)
		return nil // acknowledges the event; after an error it is redelivered
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := shipping.Start(ctx); err != nil {
		log.Fatal(err)
	}

	payments, err := aegis.New("payments", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer payments.Stop(ctx)
	// The idempotency key ensures that the event is stored only once, even if this program crashes and publishes it again within the
	// stream's duplicate window (2 minutes by default).
	err = aegis.Publish(ctx, payments, "payment", "captured", Payment{Order: "1-AAPL", Amount: 19}, aegis.IdempotencyKey("1-AAPL"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-handled)
	// Output: payment captured from payments: {1-AAPL 19}
}

// An event that is published again with the same key is stored once, within the stream's duplicate window of 2 minutes.
func ExampleIdempotencyKey() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("payments", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	handled := make(chan string, 10)
	err = aegis.Subscribe(svc, "payment.captured", func(_ context.Context, e aegis.Event[int]) error {
		handled <- fmt.Sprintf("%s: %d", e.ID, e.Data)
		return nil
	}, aegis.Concurrency(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	for _, key := range []string{"order-1", "order-1", "order-2"} {
		if err := aegis.Publish(ctx, svc, "payment", "captured", 100, aegis.IdempotencyKey(key)); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(<-handled)
	fmt.Println(<-handled)
	// Output:
	// order-1: 100
	// order-2: 100
}

// PublishBatch publishes many events at once. Its error joins one error for each event that failed, whose Details["index"] is the
// position of the event in the batch.
func ExamplePublishBatch() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	// JSON can't encode NaN, so the second event fails.
	svc, err := aegis.New("market-data", aegis.WithURL(url), aegis.WithCodec(aegis.JSON))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	prices := []float64{9.5, math.NaN(), 9.6}
	err = aegis.PublishBatch(ctx, svc, "price", "changed", prices)
	var failed interface{ Unwrap() []error }
	if errors.As(err, &failed) {
		for _, err := range failed.Unwrap() {
			var e *aegis.Error
			errors.As(err, &e)
			fmt.Println("event", e.Details["index"], e)
		}
	}
	// Output: event 1 INVALID_ARGUMENT: encoding the event price.changed: json: unsupported value: NaN
}

// This example subscribes to events of several types, whose data differ. The handler decodes each as what it is.
func ExampleRaw() {
	type Created struct {
		ID  string `json:"id"`
		Qty int    `json:"qty"`
	}
	type Canceled struct {
		ID     string `json:"id"`
		Reason string `json:"reason"`
	}
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	svc, err := aegis.New("orders", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	handled := make(chan string, 2)
	err = aegis.Subscribe(svc, "order.*", func(_ context.Context, e aegis.Event[aegis.Raw]) error {
		switch e.Type {
		case "created":
			var c Created
			if err := e.Data.Decode(&c); err != nil {
				return err // after the last attempt, the event becomes a dead letter
			}
			handled <- fmt.Sprintf("created %s: %d", c.ID, c.Qty)
		case "canceled":
			var c Canceled
			if err := e.Data.Decode(&c); err != nil {
				return err
			}
			handled <- fmt.Sprintf("canceled %s: %s", c.ID, c.Reason)
		}
		return nil
	}, aegis.Concurrency(1)) // in order
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}

	if err := aegis.Publish(ctx, svc, "order", "created", Created{ID: "1-AAPL", Qty: 100}); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "order", "canceled", Canceled{ID: "1-AAPL", Reason: "no funds"}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-handled)
	fmt.Println(<-handled)
	// Output:
	// created 1-AAPL: 100
	// canceled 1-AAPL: no funds
}

// Broadcast delivers each event to every instance of the service. Here, each instance drops an entry from its cache.
func ExampleBroadcast() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	var dropped sync.WaitGroup
	dropped.Add(2)
	for _, id := range []string{"cache-1", "cache-2"} {
		cache, err := aegis.New("cache", aegis.WithURL(url), aegis.WithID(id))
		if err != nil {
			log.Fatal(err)
		}
		defer cache.Stop(ctx)
		err = aegis.Subscribe(cache, "price.changed", func(_ context.Context, e aegis.Event[string]) error {
			fmt.Println(id, "drops", e.Data)
			dropped.Done()
			return nil
		}, aegis.Broadcast())
		if err != nil {
			log.Fatal(err)
		}
		if err := cache.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	pricing, err := aegis.New("pricing", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer pricing.Stop(ctx)
	if err := aegis.Publish(ctx, pricing, "price", "changed", "AAPL"); err != nil {
		log.Fatal(err)
	}
	dropped.Wait()
	// Unordered output:
	// cache-1 drops AAPL
	// cache-2 drops AAPL
}

// A service has one subscription for each pattern. With Durable it has several: each of them gets all events of the pattern.
func ExampleDurable() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("risk", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	var handled sync.WaitGroup
	handled.Add(2)
	for _, name := range []string{"limits", "audit"} {
		err := aegis.Subscribe(svc, "order.created", func(_ context.Context, e aegis.Event[string]) error {
			fmt.Println(name, e.Data)
			handled.Done()
			return nil
		}, aegis.Durable(name))
		if err != nil {
			log.Fatal(err)
		}
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "order", "created", "1-AAPL"); err != nil {
		log.Fatal(err)
	}
	handled.Wait()
	// Unordered output:
	// limits 1-AAPL
	// audit 1-AAPL
}

// A new subscription begins with the events that are published from then on, or with those of the past.
func ExampleFromStart() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("audit", aegis.WithURL(url), aegis.WithRetention(24*time.Hour, 1<<30))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	if err := aegis.Publish(ctx, svc, "order", "created", "before anybody subscribed"); err != nil {
		log.Fatal(err)
	}
	handled := make(chan string)
	err = aegis.Subscribe(svc, "order.>", func(_ context.Context, e aegis.Event[string]) error {
		handled <- e.Type + " " + e.Data
		return nil
	}, aegis.FromStart(), aegis.Durable("all-orders"))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-handled)
	// Output: created before anybody subscribed
}

// EventVersion states in which version an event is sent, so that a handler can read old and new ones.
func ExampleEventVersion() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("ledger", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	booked := make(chan string)
	err = aegis.Subscribe(svc, "payment.captured", func(_ context.Context, e aegis.Event[float64]) error {
		cents := e.Data
		if e.Version != "2.0" { // before, the amount was in units
			cents *= 100
		}
		booked <- fmt.Sprintf("version %q: %v cents", e.Version, cents)
		return nil
	}, aegis.Concurrency(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "payment", "captured", 19.5); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "payment", "captured", 1950.0, aegis.EventVersion("2.0")); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-booked)
	fmt.Println(<-booked)
	// Output:
	// version "": 1950 cents
	// version "2.0": 1950 cents
}

// A reminder is stored now and delivered later by the server. It is not delivered any more when it is of no use.
func ExampleAfter() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("orders", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	handled := make(chan string)
	err = aegis.Subscribe(svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
		handled <- e.Type + " " + e.Data
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "order", "unpaid", "1-AAPL", aegis.After(time.Second), aegis.ExpireAfter(time.Hour)); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "order", "created", "1-AAPL"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-handled)
	fmt.Println(<-handled)
	// Output:
	// created 1-AAPL
	// unpaid 1-AAPL
}

// Attempts and Backoff set how often an event is tried, and how long the pauses between the attempts are. The default is 10 attempts
// in up to 3 minutes.
func ExampleAttempts() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("mail", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	sent := make(chan string)
	err = aegis.Subscribe(svc, "order.paid", func(_ context.Context, e aegis.Event[string]) error {
		if e.Attempt < 3 {
			return &aegis.Error{Code: "MAILBOX_BUSY"}
		}
		sent <- fmt.Sprintf("mailed %s at attempt %d", e.Data, e.Attempt)
		return nil
	}, aegis.Attempts(5), aegis.Backoff(10*time.Millisecond, time.Second))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	if err := aegis.Publish(ctx, svc, "order", "paid", "1-AAPL"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-sent)
	// Output: mailed 1-AAPL at attempt 3
}

// A handler says which of its errors pass by themselves, and which never do.
func ExampleRetryAfter() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("payments", aegis.WithURL(url), aegis.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	bankOpens := time.Now().Add(time.Second)
	paid := make(chan string)
	err = aegis.Subscribe(svc, "order.created", func(_ context.Context, e aegis.Event[string]) error {
		switch {
		case e.Data == "":
			return aegis.Permanent(errors.New("the order has no number")) // a dead letter at once
		case time.Now().Before(bankOpens):
			return aegis.RetryAfter(errors.New("the bank is closed"), time.Until(bankOpens))
		}
		paid <- fmt.Sprintf("paid %s at attempt %d", e.Data, e.Attempt)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	if err := aegis.PublishBatch(ctx, svc, "order", "created", []string{"", "1-AAPL"}); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-paid)
	for d, err := range svc.DeadLetters(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(d.Reason)
		if err := svc.Discard(ctx, d); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// paid 1-AAPL at attempt 1
	// payments: INTERNAL: the order has no number
}

// An event that has failed on every attempt becomes a dead letter. Once the cause is fixed, Redrive has the event handled again.
func ExampleService_Redrive() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("shipping", aegis.WithURL(url), aegis.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	shipped := make(chan string)
	addressKnown := make(chan bool, 3)
	err = aegis.Subscribe(svc, "order.paid", func(_ context.Context, e aegis.Event[string]) error {
		if !<-addressKnown {
			return errors.New("no address")
		}
		shipped <- e.Data
		return nil
	}, aegis.Attempts(2), aegis.Backoff(time.Millisecond, time.Second))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	addressKnown <- false
	addressKnown <- false
	if err := aegis.Publish(ctx, svc, "order", "paid", "1-AAPL"); err != nil {
		log.Fatal(err)
	}

	var letter aegis.DeadLetter
	for letter.Sequence == 0 { // the dead letter is stored a moment after the last attempt
		for d, err := range svc.DeadLetters(ctx) {
			if err != nil {
				log.Fatal(err)
			}
			letter = d
		}
	}
	fmt.Println(letter.Subject, letter.Attempts, letter.Reason)
	addressKnown <- true
	if err := svc.Redrive(ctx, letter); err != nil {
		log.Fatal(err)
	}
	fmt.Println("shipped", <-shipped)
	// Output:
	// events.order.paid 2 shipping: INTERNAL: no address
	// shipped 1-AAPL
}

// WithRetention limits how many events are kept: here, those of a day, and at most 10 GB. It only counts when the stream is made.
func ExampleWithRetention() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("orders", aegis.WithURL(url), aegis.WithRetention(24*time.Hour, 10<<30))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	if err := aegis.Publish(ctx, svc, "order", "created", "1-AAPL"); err != nil { // makes the stream
		log.Fatal(err)
	}
	js, err := jetstream.New(svc.Conn())
	if err != nil {
		log.Fatal(err)
	}
	stream, err := js.Stream(ctx, "AEGIS_EVENTS")
	if err != nil {
		log.Fatal(err)
	}
	config := stream.CachedInfo().Config
	fmt.Println(config.MaxAge, config.MaxBytes, stream.CachedInfo().State.Msgs)
	// Output: 24h0m0s 10737418240 1
}

// A command is queued and executed by one instance of a service. Its handler reports progress, and its outcome is stored, so that
// the sender can follow the command and wait for the result.
func ExampleSendCommand() {
	type Rebalance struct {
		Portfolio string `json:"portfolio"`
	}
	type Report struct {
		Orders int `json:"orders"`
	}
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	portfolios, err := aegis.New("portfolios", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer portfolios.Stop(ctx)
	// seen makes the output of this example deterministic. A real handler doesn't wait until somebody has seen its progress.
	seen := make(chan struct{})
	err = aegis.HandleCommand(portfolios, "rebalance", func(ctx context.Context, c *aegis.Command[Rebalance]) (Report, error) {
		// After a crash, c.Last holds the last progress that the previous attempt reported.
		if err := c.Progress(50, "half of "+c.Data.Portfolio); err != nil {
			return Report{}, err // the command was cancelled, or another instance has taken over
		}
		<-seen
		return Report{Orders: 2}, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := portfolios.Start(ctx); err != nil {
		log.Fatal(err)
	}

	web, err := aegis.New("web", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer web.Stop(ctx)
	job, err := aegis.SendCommand[Rebalance, Report](ctx, web, "portfolios", "rebalance", Rebalance{Portfolio: "tech"}, aegis.AtPriority(aegis.High))
	if err != nil {
		log.Fatal(err)
	}
	for p, err := range job.Updates(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		if p.Percent > 0 {
			fmt.Println(p.State, p.Percent, p.Message)
		}
		if p.State == "running" && p.Percent == 50 {
			close(seen)
		}
	}
	fmt.Println(job.Wait(ctx))
	// Output:
	// running 50 half of tech
	// completed 100 half of tech
	// {2} <nil>
}

// A command with an idempotency key is executed only once, no matter how often and from where it is sent. Attach returns the Job
// of a command that was sent before, perhaps by another process. It finds the command by the key.
func ExampleAttach() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("billing", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	invoices := 0
	err = aegis.HandleCommand(svc, "invoice", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		invoices++
		return fmt.Sprintf("invoice %d for %s", invoices, c.Data), nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}

	for range 2 { // the second time stands for a sender that crashed and sends the command again
		job, err := aegis.SendCommand[string, string](ctx, svc, "billing", "invoice", "order 42", aegis.IdempotencyKey("order-42"))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(job.Wait(ctx))
	}
	fmt.Println(aegis.Attach[string](svc, "billing", "invoice", "order-42").Wait(ctx))
	// Output:
	// invoice 1 for order 42 <nil>
	// invoice 1 for order 42 <nil>
	// invoice 1 for order 42 <nil>
}

// Cancel ends the ctx of the handler that runs the command. A command that is still queued never runs.
func ExampleJob_Cancel() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("backtests", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	running := make(chan struct{})
	err = aegis.HandleCommand(svc, "run", func(ctx context.Context, _ *aegis.Command[string]) (float64, error) {
		close(running)
		<-ctx.Done()
		return 0, ctx.Err()
	}, aegis.Concurrency(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	job, err := aegis.SendCommand[string, float64](ctx, svc, "backtests", "run", "2020 to 2025", aegis.IdempotencyKey("b1"))
	if err != nil {
		log.Fatal(err)
	}
	<-running
	if err := job.Cancel(ctx); err != nil {
		log.Fatal(err)
	}
	_, err = job.Wait(ctx)
	fmt.Println(errors.Is(err, aegis.ErrCanceled), err)
	// Output: true CANCELED: the command b1 of backtests.run was cancelled
}

// Deadline bounds each attempt at a command or an event. The ctx of the handler ends then.
func ExampleDeadline() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("reports", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	err = aegis.HandleCommand(svc, "make", func(ctx context.Context, _ *aegis.Command[string]) (string, error) {
		<-ctx.Done() // a report that takes too long
		return "", ctx.Err()
	}, aegis.Deadline(100*time.Millisecond), aegis.Attempts(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	job, err := aegis.SendCommand[string, string](ctx, svc, "reports", "make", "daily")
	if err != nil {
		log.Fatal(err)
	}
	_, err = job.Wait(ctx)
	fmt.Println(errors.Is(err, aegis.ErrTimeout))
	// Output: true
}

// Of the commands that wait for an instance, the more urgent ones begin first.
func ExampleAtPriority() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("orders", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	for data, priority := range map[string]aegis.Priority{"rebalance": aegis.Low, "buy": aegis.Normal, "stop loss": aegis.Critical} {
		if _, err := aegis.SendCommand[string, string](ctx, svc, "orders", "run", data, aegis.AtPriority(priority)); err != nil {
			log.Fatal(err)
		}
	}
	began := make(chan string, 3)
	err = aegis.HandleCommand(svc, "run", func(_ context.Context, c *aegis.Command[string]) (string, error) {
		began <- c.Data
		return "", nil
	}, aegis.Concurrency(1))
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(<-began, <-began, <-began)
	// Output: stop loss buy rebalance
}

// At has a command executed at a time. It can be cancelled until then.
func ExampleAt() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("desk", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	tomorrow := time.Now().Add(24 * time.Hour)
	job, err := aegis.SendCommand[string, string](ctx, svc, "orders", "buy", "AAPL", aegis.At(tomorrow), aegis.IdempotencyKey("aapl-1"))
	if err != nil {
		log.Fatal(err)
	}
	for c, err := range svc.Commands(ctx, "orders") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(c.ID, c.Progress.State)
	}
	fmt.Println(job.Cancel(ctx))
	_, err = job.Wait(ctx)
	fmt.Println(errors.Is(err, aegis.ErrCanceled))
	// Output:
	// aapl-1 scheduled
	// <nil>
	// true
}

// A command that has not begun in time fails, even if no worker ever comes.
func ExampleExpireAfter() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	job, err := aegis.SendCommand[string, string](ctx, client, "orders", "buy", "AAPL", aegis.ExpireAfter(time.Second))
	if err != nil {
		log.Fatal(err)
	}
	_, err = job.Wait(ctx)
	fmt.Println(errors.Is(err, aegis.ErrTimeout))
	// Output: true
}

// A report is made every day at nine, by whichever worker is there. The server keeps the schedule.
func ExampleScheduleCommand() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("reports", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	// Each instance may do this when it starts: a schedule that has not changed is left alone.
	err = aegis.ScheduleCommand(ctx, svc, "daily", "TZ=Europe/London 0 0 9 * * MON-FRI", "reports", "make", "all books")
	if err != nil {
		log.Fatal(err)
	}
	for s, err := range svc.Schedules(ctx) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(s.Service, s.Command, s.Name, s.Spec)
	}
	fmt.Println(svc.Unschedule(ctx, "reports", "make", "daily"))
	// Output:
	// reports make daily TZ=Europe/London 0 0 9 * * MON-FRI
	// <nil>
}

// Commands for later can be cancelled, and expire. No worker has to run for that. The list is for an operator.
func ExampleService_Commands() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("trading", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	send := func(key string, opts ...aegis.CallOption) *aegis.Job[string] {
		job, err := aegis.SendCommand[int, string](ctx, svc, "orders", "execute", 100, append(opts, aegis.IdempotencyKey(key))...)
		if err != nil {
			log.Fatal(err)
		}
		return job
	}
	send("at-the-close", aegis.After(8*time.Hour))
	second := send("at-noon", aegis.After(3*time.Hour))
	if err := second.Cancel(ctx); err != nil {
		log.Fatal(err)
	}
	third := send("now-or-never", aegis.ExpireAfter(time.Second))
	if _, err := third.Wait(ctx); errors.Is(err, aegis.ErrTimeout) {
		fmt.Println("nobody has begun it")
	}
	for c, err := range svc.Commands(ctx, "orders") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%-8s %-13s %s\n", c.Command, c.ID, c.Progress.State)
	}
	// Output:
	// nobody has begun it
	// execute  at-the-close  scheduled
	// execute  at-noon       canceled
	// execute  now-or-never  failed
}

// An exclusive handler runs only in the instance that leads the service. When the leader stops, another instance takes over, and
// callers that use Sticky see no error. After a crash of the leader, the failover policy determines how long the takeover takes,
// and a call that was in flight fails unless it is Idempotent too.
func ExampleExclusive() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	var terms []uint64
	instance := func(id string) *aegis.Service {
		s, err := aegis.New("matching", aegis.WithURL(url), aegis.WithID(id), aegis.WithFailover(aegis.Aggressive))
		if err != nil {
			log.Fatal(err)
		}
		err = aegis.Handle(s, "match", func(ctx context.Context, order string) (string, error) {
			// The term is a fencing token: pass it with every write to a store that rejects terms lower than the highest it has seen.
			terms = append(terms, aegis.Term(ctx))
			return order + " matched by " + id, nil
		}, aegis.Exclusive())
		if err != nil {
			log.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			log.Fatal(err)
		}
		return s
	}
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)

	a := instance("a")
	fmt.Println(aegis.Call[string, string](ctx, client, "matching", "match", "order 1", aegis.Sticky()))
	b := instance("b")
	defer b.Stop(ctx)
	_, err = aegis.Call[string, string](ctx, client, "matching", "match", "order 2", aegis.ToInstance("b"))
	fmt.Println(err, errors.Is(err, aegis.ErrNotActive))
	if err := a.Stop(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(aegis.Call[string, string](ctx, client, "matching", "match", "order 2", aegis.Sticky()))
	leader, err := b.Leader(ctx)
	fmt.Println(leader, b.IsLeader(), terms[1] > terms[0], err)
	// Output:
	// order 1 matched by a <nil>
	// matching: NOT_ACTIVE: instance b of matching stands by: a leads true
	// order 2 matched by b <nil>
	// b true true <nil>
}

// Lead runs work that only one instance of a service may do at a time, such as a scheduler. The elected leader runs it until its
// function returns; if the leader stops or crashes, another instance is elected.
func ExampleService_Lead() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("reports", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)

	runs := 0
	err = svc.Lead(ctx, "scheduler", aegis.Aggressive, func(ctx context.Context, term uint64) error {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for runs < 3 {
			select {
			case <-tick.C:
				runs++
				fmt.Println("run", runs, "of a leader:", term == aegis.Term(ctx))
			case <-ctx.Done(): // the leadership is lost, or the service is stopping
				return ctx.Err()
			}
		}
		return nil // the work is done; returning releases the leadership
	})
	fmt.Println(err)
	// Output:
	// run 1 of a leader: true
	// run 2 of a leader: true
	// run 3 of a leader: true
	// <nil>
}

// Resign gives the leadership of the exclusive handlers to another instance, within milliseconds.
func ExampleService_Resign() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var instances []*aegis.Service
	for _, id := range []string{"a", "b"} {
		svc, err := aegis.New("matching", aegis.WithURL(url), aegis.WithID(id), aegis.WithFailover(aegis.Aggressive))
		if err != nil {
			log.Fatal(err)
		}
		defer svc.Stop(ctx)
		err = aegis.Handle(svc, "who", func(context.Context, string) (string, error) { return id, nil }, aegis.Exclusive())
		if err != nil {
			log.Fatal(err)
		}
		if err := svc.Start(ctx); err != nil {
			log.Fatal(err)
		}
		instances = append(instances, svc)
		if _, err := aegis.Call[string, string](ctx, svc, "matching", "who", "", aegis.Sticky()); err != nil { // waits for a leader
			log.Fatal(err)
		}
	}
	if err := instances[0].Resign(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println(aegis.Call[string, string](ctx, instances[0], "matching", "who", "", aegis.Sticky()))
	// Output: b <nil>
}

// Discover lists the instances of a service.
func ExampleService_Discover() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, zone := range []string{"east", "west"} {
		s, err := aegis.New("prices", aegis.WithURL(url), aegis.WithID("prices-"+zone), aegis.WithVersion("1.2.0"),
			aegis.WithMetadata(map[string]string{"zone": zone}))
		if err != nil {
			log.Fatal(err)
		}
		defer s.Stop(ctx)
		err = aegis.Handle(s, "quote", func(_ context.Context, sku string) (string, error) { return sku + " from " + zone, nil })
		if err != nil {
			log.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)

	list, err := client.Discover(ctx, "prices")
	if err != nil {
		log.Fatal(err)
	}
	for _, i := range list {
		fmt.Println(i.ID, i.Version, i.Status, i.Metadata["zone"], i.Endpoints[0].Subject)
	}
	// Output:
	// prices-east 1.2.0 ACTIVE east rpc.prices.quote
	// prices-west 1.2.0 ACTIVE west rpc.prices.quote
}

// Watch returns the list of a service's instances, and then each list that is different. Here, an instance changes its metadata.
func ExampleService_Watch() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("prices", aegis.WithURL(url), aegis.WithMetadata(map[string]string{"symbols": "none"}))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	for instances, err := range svc.Watch(ctx, "prices") {
		if err != nil {
			log.Fatal(err)
		}
		symbols := instances[0].Metadata["symbols"]
		fmt.Println("symbols:", symbols)
		if symbols != "none" {
			break
		}
		if err := svc.SetMetadata(map[string]string{"symbols": "AAPL,MSFT"}); err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// symbols: none
	// symbols: AAPL,MSFT
}

// Dependencies asks the running instances who has called them. Mermaid draws the answer as a flowchart.
func ExampleService_Dependencies() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	service := func(name, method string, fn func(ctx context.Context, s *aegis.Service, n int) (int, error)) *aegis.Service {
		s, err := aegis.New(name, aegis.WithURL(url))
		if err != nil {
			log.Fatal(err)
		}
		err = aegis.Handle(s, method, func(ctx context.Context, n int) (int, error) { return fn(ctx, s, n) })
		if err != nil {
			log.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			log.Fatal(err)
		}
		return s
	}
	pricing := service("pricing", "quote", func(_ context.Context, _ *aegis.Service, n int) (int, error) {
		if n > 100 {
			return 0, &aegis.Error{Code: "TOO_MUCH"}
		}
		return 7 * n, nil
	})
	defer pricing.Stop(ctx)
	orders := service("orders", "create", func(ctx context.Context, s *aegis.Service, n int) (int, error) {
		return aegis.Call[int, int](ctx, s, "pricing", "quote", n)
	})
	defer orders.Stop(ctx)
	web, err := aegis.New("web", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer web.Stop(ctx)
	for _, n := range []int{1, 2, 500} {
		_, _ = aegis.Call[int, int](ctx, web, "orders", "create", n)
	}

	deps, err := web.Dependencies(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(aegis.Mermaid(deps))
	// Output:
	// flowchart LR
	//     s0["orders"]
	//     s1["pricing"]
	//     s2["web"]
	//     s2 -->|"create: 3, 1 failed"| s0
	//     s0 -->|"quote: 3, 1 failed"| s1
}

// Mermaid draws one arrow from a caller to a service and labels it with all endpoints that the caller uses.
func ExampleMermaid() {
	fmt.Print(aegis.Mermaid([]aegis.Dependency{
		{From: "web", To: "orders", Endpoint: "create", Requests: 12, Errors: 1},
		{From: "web", To: "orders", Endpoint: "cancel", Requests: 3},
	}))
	// Output:
	// flowchart LR
	//     s0["orders"]
	//     s1["web"]
	//     s1 -->|"create: 12, 1 failed<br>cancel: 3"| s0
}

// Run starts the service, waits until ctx ends, and stops it. What runs then may finish. In a program, ctx comes from
// signal.NotifyContext, so that SIGTERM ends it.
func ExampleService_Run() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("greeter", aegis.WithURL(url), aegis.WithStopTimeout(5*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	err = aegis.Handle(svc, "greet", func(_ context.Context, name string) (string, error) {
		cancel() // from now on, the service stops
		time.Sleep(50 * time.Millisecond)
		return "hello " + name, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	called := make(chan string)
	go func() {
		client, err := aegis.New("client", aegis.WithURL(url))
		if err != nil {
			log.Fatal(err)
		}
		defer client.Stop(context.Background())
		answer, err := aegis.Call[string, string](context.Background(), client, "greeter", "greet", "Ada", aegis.Sticky())
		called <- fmt.Sprint(answer, " ", err)
	}()
	fmt.Println(svc.Run(ctx))
	fmt.Println(<-called)
	// Output:
	// <nil>
	// hello Ada <nil>
}

// WithNATS takes any option of nats.go, such as credentials, TLS, or a handler of what happens to the connections.
func ExampleWithNATS() {
	url, stop := embeddedServer()
	defer stop()
	ctx := context.Background()
	connected := make(chan string, 1)
	svc, err := aegis.New("orders", aegis.WithURL(url), aegis.WithPool(1), aegis.WithNATS(
		nats.UserInfo("orders", "secret"), // or nats.UserCredentials, nats.RootCAs, ...
		nats.ConnectHandler(func(nc *nats.Conn) { connected <- nc.Opts.User }),
	))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	fmt.Println("connected as", <-connected)
	// Output: connected as orders
}

// An instance whose database is out of reach takes no calls but those that are addressed to it, so that the other one gets them all.
// With WithHealthTolerance(3), a check that passed has to fail three times in a row before that happens.
func ExampleWithHealthCheck() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	database := map[string]error{"east": errors.New("connection refused"), "west": nil}
	for id, failure := range database {
		svc, err := aegis.New("risk", aegis.WithURL(url), aegis.WithID(id), aegis.WithHeartbeat(time.Second),
			aegis.WithHealthCheck("database", func(context.Context) error { return failure }), aegis.WithHealthTolerance(3),
			aegis.WithLogger(slog.New(slog.DiscardHandler)))
		if err != nil {
			log.Fatal(err)
		}
		defer svc.Stop(ctx)
		err = aegis.Handle(svc, "who", func(context.Context, string) (string, error) { return id, nil })
		if err != nil {
			log.Fatal(err)
		}
		if err := svc.Start(ctx); err != nil {
			log.Fatal(err)
		}
	}
	client, err := aegis.New("client", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Stop(ctx)
	instances, err := client.Discover(ctx, "risk")
	if err != nil {
		log.Fatal(err)
	}
	for _, i := range instances {
		fmt.Println(i.ID, i.Status)
	}
	calls := map[string]int{}
	for range 10 {
		who, err := aegis.Call[string, string](ctx, client, "risk", "who", "")
		if err != nil {
			log.Fatal(err)
		}
		calls[who]++
	}
	fmt.Println(calls)
	// Output:
	// east UNHEALTHY
	// west ACTIVE
	// map[west:10]
}

// Handler serves metrics for Prometheus and probes for Kubernetes. Serve it on a port that is separate from your application's.
func ExampleService_Handler() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("risk", aegis.WithURL(url),
		aegis.WithHealthCheck("database", func(context.Context) error { return errors.New("connection refused") }))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	err = aegis.Handle(svc, "check", func(_ context.Context, qty int) (bool, error) {
		if qty < 0 {
			return false, &aegis.Error{Code: "BAD_QUANTITY"}
		}
		return qty < 1000, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	for _, qty := range []int{10, 20, -1} {
		_, _ = aegis.Call[int, bool](ctx, svc, "risk", "check", qty, aegis.ToInstance(svc.ID()))
	}

	admin := httptest.NewServer(svc.Handler()) // in a service: go http.ListenAndServe(":9090", svc.Handler())
	defer admin.Close()
	for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
		answer, err := http.Get(admin.URL + path)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(path, answer.Status)
		for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
			line := lines.Text()
			if path != "/metrics" || strings.Contains(line, "aegis_requests_total") && !strings.HasSuffix(line, " 0") {
				fmt.Println(line)
			}
		}
		answer.Body.Close()
	}
	// Output:
	// /healthz 200 OK
	// {"status":"ok","checks":{"service":"ok"}}
	// /readyz 503 Service Unavailable
	// {"status":"unavailable","checks":{"connection":"ok","database":"INTERNAL: connection refused","service":"ok"}}
	// /metrics 200 OK
	// # HELP aegis_requests_total Requests, events, commands and calls that came to an end, by error code, which is empty for success.
	// # TYPE aegis_requests_total counter
	// aegis_requests_total{service="risk",kind="call",endpoint="risk.check",code=""} 2
	// aegis_requests_total{service="risk",kind="call",endpoint="risk.check",code="BAD_QUANTITY"} 1
	// aegis_requests_total{service="risk",kind="rpc",endpoint="check",code=""} 2
	// aegis_requests_total{service="risk",kind="rpc",endpoint="check",code="BAD_QUANTITY"} 1
}

// Stats returns the figures of a service: its connections, and for each endpoint the requests, errors, callers and latencies.
func ExampleService_Stats() {
	url, stop := embeddedServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	svc, err := aegis.New("greeter", aegis.WithURL(url))
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Stop(ctx)
	err = aegis.Handle(svc, "greet", func(_ context.Context, name string) (string, error) {
		if name == "" {
			return "", aegis.ErrInvalid
		}
		return "hello " + name, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := svc.Start(ctx); err != nil {
		log.Fatal(err)
	}
	for _, name := range []string{"Ada", "Grace", ""} {
		_, _ = aegis.Call[string, string](ctx, svc, "greeter", "greet", name)
	}

	st := svc.Stats()
	fmt.Println(st.Service, st.Connected, "connections")
	for _, e := range st.Endpoints {
		fmt.Println(e.Kind, e.Name, e.Requests, e.Errors, e.Codes, e.InFlight, e.Callers, e.P50 <= e.P99 && e.P99 <= e.Max)
	}
	// Output:
	// greeter 2 connections
	// call greeter.greet 3 1 map[INVALID_ARGUMENT:1] 0 map[] true
	// rpc greet 3 1 map[INVALID_ARGUMENT:1] 0 map[greeter:3] true
}
