package aegis_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// embeddedServer runs a NATS server in this process, so that each example is a program that runs anywhere.
func embeddedServer() (url string, stop func()) {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true})
	if err != nil {
		log.Fatal(err)
	}
	srv.Start()
	if !srv.ReadyForConnections(10 * time.Second) {
		log.Fatal("the server doesn't start")
	}
	return srv.ClientURL(), func() { srv.Shutdown(); srv.WaitForShutdown() }
}

// An order service and a caller.
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

// Any NATS client can call, in JSON, and is answered in JSON.
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

	nc, err := nats.Connect(url) // not aegis
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

// Errors are compared with errors.Is, and say whether it is safe to try again.
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
	// UNAVAILABLE: nobody listens on rpc.nobody.hello: nobody is not running
}

// Sticky keeps at a call that nobody could take yet; Idempotent would also send again what may have run.
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

	svc, err := aegis.New("doubler", aegis.WithURL(url)) // comes up while the call waits
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

// Middleware sees every message before its handler. This one wants a token, which callers send in a header.
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
