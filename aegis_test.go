package aegis_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"
)

// TestMain fails if goroutines of the library or of nats.go are left when all services were stopped.
func TestMain(m *testing.M) {
	if child := os.Getenv("AEGIS_TEST_CHILD"); child != "" {
		os.Exit(runChild(child))
	}
	code := m.Run()
	if code == 0 {
		if left := leaked(10 * time.Second); left != "" {
			fmt.Fprintln(os.Stderr, "goroutines left behind:\n"+left)
			code = 1
		}
	}
	os.Exit(code)
}

// leaked returns the stacks of what still runs in aegis or nats.go after patience has run out.
func leaked(patience time.Duration) string {
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		buf := make([]byte, 4<<20)
		buf = buf[:runtime.Stack(buf, true)]
		var left []string
		for _, g := range strings.Split(string(buf), "\n\n") {
			if strings.Contains(g, "aegistrader/aegis.") || strings.Contains(g, "nats-io/nats.go.") || strings.Contains(g, "nats-io/nats%2ego.") {
				left = append(left, g)
			}
		}
		if len(left) == 0 {
			return ""
		}
		if time.Now().After(end) {
			return strings.Join(left, "\n\n")
		}
	}
}

// startServer runs a nats-server in this process until the test ends.
func startServer(tb testing.TB, configure ...func(*server.Options)) *server.Server {
	tb.Helper()
	opts := &server.Options{Host: "127.0.0.1", Port: freePort(tb), NoLog: true, NoSigs: true}
	for _, c := range configure {
		c(opts)
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		tb.Fatal(err)
	}
	srv.Start()
	tb.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(10 * time.Second) {
		tb.Fatal("the server doesn't start")
	}
	return srv
}

var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32N(12000)) }

// freePort is a port that no one else gets here, below those that systems give out by themselves: so a server can come back to it.
func freePort(tb testing.TB) int {
	tb.Helper()
	for range 12000 {
		port := 20000 + int(lastPort.Add(1)%12000)
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			l.Close()
			return port
		}
	}
	tb.Fatal("no port is free")
	return 0
}

// onPort makes startServer listen where an earlier server did.
func onPort(srv *server.Server) func(*server.Options) {
	port := srv.Addr().(*net.TCPAddr).Port
	return func(o *server.Options) { o.Port = port }
}

// newService makes a service that is stopped when the test ends.
func newService(tb testing.TB, srv *server.Server, name string, opts ...aegis.Option) *aegis.Service {
	tb.Helper()
	quiet := slog.New(slog.DiscardHandler)
	s, err := aegis.New(name, append([]aegis.Option{aegis.WithURL(srv.ClientURL()), aegis.WithLogger(quiet)}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = s.Stop(ctx) // the server may be gone already
	})
	return s
}

func start(tb testing.TB, s *aegis.Service) {
	tb.Helper()
	if err := s.Start(context.Background()); err != nil {
		tb.Fatal(err)
	}
}

func handle[Req, Resp any](tb testing.TB, s *aegis.Service, method string, fn func(context.Context, Req) (Resp, error), opts ...aegis.HandlerOption) {
	tb.Helper()
	if err := aegis.Handle(s, method, fn, opts...); err != nil {
		tb.Fatal(err)
	}
}

// eventually waits until ok.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("never: %s", what)
		}
	}
}

// fails checks an error's code and returns it.
func fails(tb testing.TB, err error, kind *aegis.Error, words ...string) *aegis.Error {
	tb.Helper()
	var e *aegis.Error
	if !errors.As(err, &e) || e.Code != kind.Code {
		tb.Fatalf("got error %v, want %s", err, kind.Code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			tb.Errorf("the error %q doesn't mention %q", err, w)
		}
	}
	return e
}

// promptly fails the test if fn takes long enough to have waited for a timeout.
func promptly(tb testing.TB, fn func()) {
	tb.Helper()
	begin := time.Now()
	fn()
	if took := time.Since(begin); took > 2*time.Second {
		tb.Errorf("it took %v", took)
	}
}

type Order struct {
	SKU  string            `json:"sku"`
	Qty  int               `json:"qty"`
	Tags map[string]string `json:"tags,omitempty"`
}

type Receipt struct {
	ID  string    `json:"id"`
	At  time.Time `json:"at"`
	Raw []byte    `json:"raw,omitempty"`
}

func createOrder(_ context.Context, o Order) (Receipt, error) {
	return Receipt{ID: fmt.Sprintf("%s-%d", o.SKU, o.Qty), Raw: []byte(o.Tags["raw"])}, nil
}

func echo(_ context.Context, s string) (string, error) { return s, nil }

func call[Req, Resp any](s *aegis.Service, service, method string, req Req, opts ...aegis.CallOption) (Resp, error) {
	return aegis.Call[Req, Resp](context.Background(), s, service, method, req, opts...)
}

// Calls and values.

func TestCall(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	for _, serverCodec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
		for _, clientCodec := range []aegis.Codec{aegis.MsgPack, aegis.JSON, gobbledygook{}} {
			if (clientCodec == gobbledygook{}) && clientCodec != serverCodec {
				continue
			}
			t.Run(serverCodec.ContentType()+" "+clientCodec.ContentType(), func(t *testing.T) {
				svc := newService(t, srv, "order-service", aegis.WithCodec(serverCodec))
				handle(t, svc, "create_order", createOrder)
				start(t, svc)
				handle(t, svc, "added_later", createOrder)
				handle(t, svc, "double", func(_ context.Context, n int) (int, error) { return 2 * n, nil })
				client := newService(t, srv, "client", aegis.WithCodec(clientCodec))
				for _, method := range []string{"create_order", "added_later"} {
					got, err := call[Order, Receipt](client, "order-service", method, Order{SKU: "x", Qty: 3, Tags: map[string]string{"raw": "r"}})
					if err != nil || got.ID != "x-3" || string(got.Raw) != "r" {
						t.Errorf("%s: got %+v, %v", method, got, err)
					}
				}
				for n := range 200 { // one byte of MessagePack or JSON doesn't tell which it is
					if got, err := call[int, int](client, "order-service", "double", n); got != 2*n || err != nil {
						t.Fatalf("double(%d): got %d, %v", n, got, err)
					}
				}
				if err := svc.Stop(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// gobbledygook is a codec of a user's own: JSON with every bit flipped.
type gobbledygook struct{}

func (gobbledygook) ContentType() string { return "application/gobbledygook" }
func (gobbledygook) Marshal(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	return flip(data), err
}
func (gobbledygook) Unmarshal(data []byte, v any) error { return json.Unmarshal(flip(data), v) }

func flip(data []byte) []byte {
	out := make([]byte, len(data))
	for i, b := range data {
		out[i] = ^b
	}
	return out
}

func TestPlainNATSClient(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "order-service")
	handle(t, svc, "create_order", createOrder)
	handle(t, svc, "refuse", func(context.Context, Order) (Receipt, error) {
		return Receipt{}, &aegis.Error{Code: "NO_FUNDS", Message: "balance is 3", Details: map[string]string{"balance": "3"}}
	})
	sources := make(chan string, 10)
	handle(t, svc, "deadline", func(ctx context.Context, _ Order) (time.Duration, error) {
		sources <- aegis.CorrelationID(ctx)
		d, _ := ctx.Deadline()
		return time.Until(d), nil
	})
	start(t, svc)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	m, err := nc.Request("rpc.order-service.create_order", []byte(`{"sku":"x","qty":2}`), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var r Receipt
	if err := json.Unmarshal(m.Data, &r); err != nil || r.ID != "x-2" {
		t.Errorf("got %s", m.Data)
	}
	if len(m.Header) != 0 {
		t.Errorf("a plain answer has headers: %v", m.Header)
	}

	m, err = nc.Request("rpc.order-service.refuse", []byte(`{}`), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var e aegis.Error
	if err := json.Unmarshal(m.Data, &e); err != nil || e.Code != "NO_FUNDS" || e.Details["balance"] != "3" || e.Source != "order-service" {
		t.Errorf("got %s", m.Data)
	}
	if code, text := m.Header.Get("Nats-Service-Error-Code"), m.Header.Get("Nats-Service-Error"); code != "422" || !strings.Contains(text, "balance is 3") {
		t.Errorf("got error headers %q, %q", code, text)
	}

	m, err = nc.Request("rpc.order-service.deadline", []byte(`{}`), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if ns, _ := strconv.ParseInt(string(m.Data), 10, 64); time.Duration(ns) < 4*time.Second || time.Duration(ns) > 5*time.Second {
		t.Errorf("a caller that tells no deadline: the handler has %v, want the 5 s of WithTimeout", time.Duration(ns))
	}
	if id := <-sources; id == "" {
		t.Error("no correlation id for a plain caller")
	}
	if err := nc.Publish("rpc.order-service.deadline", []byte(`{}`)); err != nil { // asks for no answer
		t.Fatal(err)
	}
	if id := <-sources; id == "" {
		t.Error("no correlation id for a plain message")
	}
}

// What travels with a call.

func TestContextTravels(t *testing.T) {
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

	for _, id := range []string{"order-77", "an id. that is no token"} { // of the user's own
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
		child, cancel := context.WithCancel(ctx) // what most libraries do first
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
		t.Error("a call past its deadline was sent")
	}
}

// A deadline that is never to come is one all the same.
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
	one := aegis.WithPool(1) // so that cancellations arrive in their order
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
			_, err := aegis.Call[int, int](ctx, client, "svc", "wait", n, aegis.Sticky()) // OVERLOADED while one waits
			failed <- err
		}()
		return cancel, failed
	}
	cancel0, failed0 := begin(0)
	<-running
	cancel1, failed1 := begin(1)      // waits its turn
	time.Sleep(50 * time.Millisecond) // for it to be sent; the test holds if it isn't
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
		t.Errorf("the handler learned of it after %v", took)
	}
	cancel7, failed7 := begin(7)
	if n := <-running; n != 7 {
		t.Errorf("call %d ran although it was cancelled while it waited", n)
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
	time.Sleep(500 * time.Millisecond) // well past its deadline: the instance only knows when it noticed the request
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if _, err := call[int, int](client, "svc", "work", 3, aegis.Sticky()); err != nil { // is behind the expired one, which may still wait
		t.Error(err)
	}
	if n := ran.Load(); n != 2 {
		t.Errorf("%d requests ran, want 2", n)
	}
}

// Errors.

func TestErrors(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	noFunds := &aegis.Error{Code: "NO_FUNDS", Message: "balance is 3", Details: map[string]string{"balance": "3"}, NotRun: true}
	for method, fn := range map[string]func() error{
		"own":      func() error { return noFunds },
		"wrapped":  func() error { return fmt.Errorf("order 7: %w", noFunds) },
		"sentinel": func() error { return fmt.Errorf("order 7: %w", aegis.ErrNotFound) },
		"plain":    func() error { return errors.New("disk full") },
		"deadline": func() error { return fmt.Errorf("reading: %w", context.DeadlineExceeded) },
		"nil":      func() error { return (*aegis.Error)(nil) },
		"panic":    func() error { panic("boom") },
		"index":    func() error { return []error{}[len(os.Args)] },
		"goexit":   func() error { runtime.Goexit(); return nil },
	} {
		handle(t, svc, method, func(context.Context, int) (int, error) { return 0, fn() }, aegis.Concurrency(1))
	}
	handle(t, svc, "unencodable", func(context.Context, int) (chan int, error) { return nil, nil })
	start(t, svc)
	client := newService(t, srv, "client")
	for range 3 { // a handler that panics goes on serving
		for _, c := range []struct{ method, code, message, text string }{
			{"own", "NO_FUNDS", "balance is 3", "svc: NO_FUNDS: balance is 3"},
			{"wrapped", "NO_FUNDS", "order 7: balance is 3", "svc: NO_FUNDS: order 7: balance is 3"},
			{"sentinel", "NOT_FOUND", "order 7", "svc: NOT_FOUND: order 7"},
			{"plain", "INTERNAL", "disk full", "svc: INTERNAL: disk full"},
			{"deadline", "DEADLINE_EXCEEDED", "reading: context deadline exceeded", "svc: DEADLINE_EXCEEDED: reading: context deadline exceeded"},
			{"nil", "INTERNAL", "the handler returned a nil *aegis.Error", ""},
			{"panic", "INTERNAL", "panic in panic: boom", "svc: INTERNAL: panic in panic: boom"},
			{"index", "INTERNAL", "panic in index: runtime error: index out of range", ""},
			{"goexit", "INTERNAL", "panic in goexit: the handler called runtime.Goexit", "svc: INTERNAL: panic in goexit: the handler called runtime.Goexit"},
		} {
			_, err := call[int, int](client, "svc", c.method, 1)
			e := fails(t, err, &aegis.Error{Code: c.code})
			if !strings.HasPrefix(e.Message, c.message) || c.text != "" && e.Error() != c.text || e.Source != "svc" || e.NotRun || e.Cause != nil {
				t.Errorf("%s: got %+v, %q", c.method, *e, e)
			}
			if strings.Contains(c.code, "FUNDS") && !reflect.DeepEqual(e.Details, noFunds.Details) {
				t.Errorf("%s: details %v", c.method, e.Details)
			}
		}
		_, err := call[int, int](client, "svc", "unencodable", 1)
		fails(t, err, aegis.ErrInternal, "unencodable")
	}
	if !noFunds.NotRun || noFunds.Source != "" {
		t.Errorf("the handler's error was changed: %+v", noFunds)
	}
	if errors.Is(noFunds, aegis.ErrNotFound) || !errors.Is(&aegis.Error{Code: "NOT_FOUND"}, aegis.ErrNotFound) {
		t.Error("errors.Is doesn't go by the code")
	}
}

func TestErrorChainOverThreeHops(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	a, b, c := newService(t, srv, "a"), newService(t, srv, "b"), newService(t, srv, "c")
	handle(t, c, "m", func(context.Context, int) (int, error) {
		return 0, &aegis.Error{Code: "NO_FUNDS", Message: "balance is 3"}
	})
	handle(t, b, "wrap", func(ctx context.Context, n int) (int, error) {
		n, err := aegis.Call[int, int](ctx, b, "c", "m", n)
		return n, fmt.Errorf("reserving: %w", err)
	})
	handle(t, b, "pass", func(ctx context.Context, n int) (int, error) {
		return aegis.Call[int, int](ctx, b, "c", "m", n)
	})
	handle(t, b, "nowhere", func(ctx context.Context, n int) (int, error) {
		return aegis.Call[int, int](ctx, b, "d", "m", n)
	})
	for _, via := range []string{"wrap", "pass", "nowhere"} {
		handle(t, a, via, func(ctx context.Context, n int) (int, error) {
			n, err := aegis.Call[int, int](ctx, a, "b", via, n)
			return n, fmt.Errorf("order 7: %w", err)
		})
	}
	for _, s := range []*aegis.Service{a, b, c} {
		start(t, s)
	}
	client := newService(t, srv, "client")
	sources := func(err error) (s []string) {
		var e *aegis.Error
		for errors.As(err, &e) {
			s, err = append(s, e.Source), e.Unwrap()
		}
		return s
	}

	_, err := call[int, int](client, "a", "wrap", 1)
	fails(t, err, &aegis.Error{Code: "NO_FUNDS"})
	if got := err.Error(); got != "a: NO_FUNDS: order 7: b: NO_FUNDS: reserving: c: NO_FUNDS: balance is 3" {
		t.Errorf("got %q", got)
	}
	if got := sources(err); !reflect.DeepEqual(got, []string{"a", "b", "c"}) {
		t.Errorf("got sources %v", got)
	}

	_, err = call[int, int](client, "a", "pass", 1)
	if got := err.Error(); got != "a: NO_FUNDS: order 7: b: c: NO_FUNDS: balance is 3" {
		t.Errorf("got %q", got)
	}
	if got := sources(err); !reflect.DeepEqual(got, []string{"a", "b", "c"}) {
		t.Errorf("got sources %v", got)
	}

	_, err = call[int, int](client, "a", "nowhere", 1)
	e := fails(t, err, aegis.ErrUnavailable, "d is not running")
	if e.NotRun {
		t.Error("a ran, but its error says that it did not")
	}
	if !errors.Is(err, aegis.ErrUnavailable) {
		t.Error("errors.Is")
	}
}

func TestInvalidInput(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	for _, name := range []string{"", "1a", "-a", "a.b", "a b", "a*", "a>", "größe", strings.Repeat("a", 65)} {
		promptly(t, func() {
			_, err := aegis.New(name, aegis.WithURL(srv.ClientURL()))
			fails(t, err, aegis.ErrInvalid, "service", strconv.Quote(name))
		})
	}
	for want, opt := range map[string]aegis.Option{
		"WithPool(0)":          aegis.WithPool(0),
		"WithPool(65)":         aegis.WithPool(65),
		`WithID("a.b")`:        aegis.WithID("a.b"),
		`WithID("")`:           aegis.WithID(""),
		`WithVersion("1.0")`:   aegis.WithVersion("1.0"),
		"WithCodec(nil)":       aegis.WithCodec(nil),
		"WithLogger(nil)":      aegis.WithLogger(nil),
		"WithTimeout(0s)":      aegis.WithTimeout(0),
		"WithConcurrency(0)":   aegis.WithConcurrency(0),
		"WithBreaker(":         aegis.WithBreaker(aegis.BreakerPolicy{Failures: -1}),
		"WithMiddleware(nil)":  aegis.WithMiddleware(nil),
		"WithURL()":            aegis.WithURL(),
		`WithURL("")`:          aegis.WithURL(""),
		`WithURL("nats://")`:   aegis.WithURL("nats://"),
		`WithURL("http://a b`:  aegis.WithURL("http://a b"),
		"WithNATS: no option!": aegis.WithNATS(func(*nats.Options) error { return errors.New("no option!") }),
	} {
		_, err := aegis.New("svc", aegis.WithURL(srv.ClientURL()), opt)
		fails(t, err, aegis.ErrInvalid, want)
	}

	svc := newService(t, srv, "svc")
	for _, method := range []string{"", "1a", "a-b", "a.b", "a b", "*"} {
		fails(t, aegis.Handle(svc, method, echo), aegis.ErrInvalid, "method", strconv.Quote(method))
		_, err := call[string, string](svc, "svc", method, "")
		if e := fails(t, err, aegis.ErrInvalid, "method", strconv.Quote(method)); !e.NotRun {
			t.Error("it says that it may have run")
		}
	}
	fails(t, aegis.Handle(svc, "m", echo, aegis.Concurrency(0)), aegis.ErrInvalid, "Concurrency(0)")
	fails(t, aegis.Handle[int, int](svc, "m", nil), aegis.ErrInvalid, "nil")
	handle(t, svc, "m", echo)
	fails(t, aegis.Handle(svc, "m", echo), aegis.ErrInvalid, "rpc.svc.m")
	_, err := call[string, string](svc, "s.v", "m", "")
	fails(t, err, aegis.ErrInvalid, "s.v")
	_, err = call[string, string](svc, "svc", "m", "", aegis.ToInstance("*"))
	fails(t, err, aegis.ErrInvalid, "ToInstance")
	_, err = call[string, string](svc, "svc", "m", "", aegis.Retry(aegis.RetryPolicy{Attempts: -1}))
	fails(t, err, aegis.ErrInvalid, "Retry")
	_, err = call[chan int, string](svc, "svc", "m", nil)
	fails(t, err, aegis.ErrInvalid, "chan int")
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	promptly(t, func() {
		_, err := aegis.New("svc", aegis.WithURL("nats://user:secret@"+address))
		fails(t, err, aegis.ErrUnavailable, address)
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("the error shows the password: %v", err)
		}
	})

	srv := startServer(t)
	client := newService(t, srv, "client")
	svc := newService(t, srv, "svc", aegis.WithID("one"), aegis.WithVersion("1.2.3"))
	handle(t, svc, "m", echo)
	start(t, svc)
	promptly(t, func() {
		_, err := call[string, string](client, "nobody", "m", "")
		if e := fails(t, err, aegis.ErrUnavailable, "nobody is not running"); !e.NotRun {
			t.Error("it says that it may have run")
		}
		_, err = call[string, string](client, "svc", "nothing", "")
		if e := fails(t, err, aegis.ErrUnimplemented, "rpc.svc.nothing", "one", "1.2.3"); !e.NotRun {
			t.Error("it says that it may have run")
		}
		_, err = call[string, string](client, "svc", "m", "", aegis.ToInstance("two"))
		fails(t, err, aegis.ErrUnavailable, "two")
		_, err = call[string, string](client, "svc", "nothing", "", aegis.ToInstance("one"))
		fails(t, err, aegis.ErrUnimplemented, "rpc.svc.nothing")
		if got, err := call[string, string](client, "svc", "m", "hi", aegis.ToInstance("one")); got != "hi" || err != nil {
			t.Error(got, err)
		}
	})
}

func TestUndecodable(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", createOrder)
	start(t, svc)
	client := newService(t, srv, "client")
	nc := client.Conn()
	for _, data := range [][]byte{nil, {0xc1}, {0x81}, []byte("{"), []byte("[1,2]"), []byte("nonsense"), {0xdd, 0xff, 0xff, 0xff, 0xff}, bytes.Repeat([]byte{0x91}, 100_000)} {
		m, err := nc.Request("rpc.svc.m", data, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if code := m.Header.Get("Nats-Service-Error-Code"); code != "400" {
			t.Errorf("%.20q: got %s", data, code)
		}
	}
	m, err := nc.RequestMsg(&nats.Msg{Subject: "rpc.svc.m", Data: []byte("<x/>"), Header: nats.Header{"Content-Type": {"text/xml"}}}, 5*time.Second)
	if err != nil || !strings.Contains(m.Header.Get("Nats-Service-Error"), "text/xml") {
		t.Errorf("got %v, %v", m, err)
	}
	_, err = call[string, Receipt](client, "svc", "m", "not an order")
	if e := fails(t, err, aegis.ErrInvalid, "rpc.svc.m"); !e.NotRun {
		t.Error("it says that it may have run")
	}
	_, err = call[Order, int](client, "svc", "m", Order{})
	if e := fails(t, err, aegis.ErrInternal, "svc.m"); e.NotRun {
		t.Error("it ran, and the error says that it did not")
	}
	if got, err := call[Order, Receipt](client, "svc", "m", Order{SKU: "x"}); got.ID != "x-0" || err != nil {
		t.Error(got, err)
	}
}

func TestTooLarge(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) { o.MaxPayload = 32 << 10 })
	svc := newService(t, srv, "svc")
	handle(t, svc, "repeat", func(_ context.Context, n int) ([]byte, error) { return make([]byte, n), nil })
	handle(t, svc, "fail", func(_ context.Context, n int) ([]byte, error) {
		return nil, &aegis.Error{Code: "HUGE", Message: strings.Repeat("x", n)}
	})
	handle(t, svc, "take", func(_ context.Context, b []byte) (int, error) { return len(b), nil })
	start(t, svc)
	client := newService(t, srv, "client")
	promptly(t, func() {
		_, err := call[int, []byte](client, "svc", "repeat", 40<<10)
		if e := fails(t, err, aegis.ErrInternal, "32768", "repeat"); e.NotRun {
			t.Error("it ran, and the error says that it did not")
		}
		_, err = call[int, []byte](client, "svc", "fail", 40<<10)
		fails(t, err, &aegis.Error{Code: "HUGE"}, "32768")
		_, err = call[[]byte, int](client, "svc", "take", make([]byte, 40<<10))
		if e := fails(t, err, aegis.ErrInvalid, "32768", "rpc.svc.take"); !e.NotRun {
			t.Error("it says that it may have run")
		}
		if got, err := call[int, []byte](client, "svc", "repeat", 20<<10); len(got) != 20<<10 || err != nil {
			t.Error(len(got), err)
		}
	})
}

// Lifecycle.

func TestLifecycle(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	client := newService(t, srv, "client")
	handle(t, svc, "m", echo)
	if svc.Name() != "svc" || !strings.HasPrefix(svc.ID(), "svc-") || len(svc.ID()) != len("svc-12345678") {
		t.Errorf("name %q, id %q", svc.Name(), svc.ID())
	}
	_, err := call[string, string](client, "svc", "m", "")
	fails(t, err, aegis.ErrUnavailable)
	start(t, svc)
	fails(t, svc.Start(t.Context()), aegis.ErrInvalid, "started already")
	for range 2 {
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	promptly(t, func() {
		_, err = call[string, string](svc, "svc", "m", "")
		if e := fails(t, err, aegis.ErrClosed, "svc"); !e.NotRun {
			t.Error("it says that it may have run")
		}
		fails(t, svc.Start(t.Context()), aegis.ErrClosed)
		fails(t, aegis.Handle(svc, "other", echo), aegis.ErrClosed)
		_, err = call[string, string](client, "svc", "m", "")
		fails(t, err, aegis.ErrUnavailable, "not running")
	})
}

func TestRun(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", echo)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- svc.Run(ctx) }()
	client := newService(t, srv, "client")
	if got, err := call[string, string](client, "svc", "m", "hi", aegis.Sticky()); got != "hi" || err != nil {
		t.Error(got, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestStopFinishesWhatRuns(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	running, release := make(chan struct{}, 4), make(chan struct{})
	handle(t, svc, "m", func(ctx context.Context, n int) (string, error) {
		running <- struct{}{}
		<-release
		return aegis.Call[string, string](ctx, svc, "helper", "echo", strconv.Itoa(n)) // it may still call
	}, aegis.Concurrency(2))
	start(t, svc)
	helper := newService(t, srv, "helper")
	handle(t, helper, "echo", echo)
	start(t, helper)
	results := make(chan error, 4)
	for n := range 4 { // two run, two wait
		go func() {
			got, err := call[int, string](client, "svc", "m", n)
			if err == nil && got != strconv.Itoa(n) {
				err = fmt.Errorf("got %q for %d", got, n)
			}
			results <- err
		}()
	}
	<-running
	<-running
	time.Sleep(50 * time.Millisecond) // for the others to arrive
	stopped := make(chan error)
	go func() { stopped <- svc.Stop(context.Background()) }()
	eventually(t, "no new calls are taken", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // it may still have got in, and wait
		defer cancel()
		_, err := aegis.Call[int, string](ctx, client, "svc", "m", 9)
		return errors.Is(err, aegis.ErrUnavailable)
	})
	select {
	case err := <-stopped:
		t.Fatalf("Stop returned %v while handlers run", err)
	default:
	}
	close(release)
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

func TestStopRunsOutOfTime(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	running := make(chan struct{}, 1)
	handle(t, svc, "m", func(ctx context.Context, n int) (int, error) {
		running <- struct{}{}
		<-ctx.Done()
		return 0, ctx.Err()
	}, aegis.Concurrency(1))
	start(t, svc)
	results := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := call[int, int](client, "svc", "m", 1)
			results <- err
		}()
	}
	<-running
	time.Sleep(50 * time.Millisecond) // for the other to arrive
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	promptly(t, func() {
		fails(t, svc.Stop(ctx), aegis.ErrTimeout, "1 handlers running")
		var ran, refused int
		for range 2 {
			switch err := <-results; {
			case errors.Is(err, aegis.ErrCanceled):
				ran++
			default:
				if e := fails(t, err, aegis.ErrUnavailable, "stopping"); !e.NotRun {
					t.Error("it says that it may have run")
				}
				refused++
			}
		}
		if ran != 1 || refused != 1 {
			t.Errorf("%d ran, %d refused", ran, refused)
		}
	})
}

func TestStopWhileDisconnected(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", echo)
	start(t, svc)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "it notices", func() bool { return !svc.Conn().IsConnected() })
	promptly(t, func() {
		fails(t, svc.Stop(context.Background()), aegis.ErrUnavailable)
		if err := svc.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		_, err := call[string, string](svc, "svc", "m", "")
		fails(t, err, aegis.ErrClosed)
	})
}

// Load and faults.

func TestBlockingHandlers(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "countdown", func(ctx context.Context, n int) (int, error) { // each waits for the next, on the same handler
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
	handle(t, svc, "suddenly", func(_ context.Context, n int) (int, error) { // fast as a rule, so that it has few workers
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

func TestOverload(t *testing.T) {
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
		for range 14 { // 3 run, 3 wait
			if e := fails(t, <-results, aegis.ErrOverloaded, "rpc.svc.m", "3"); !e.NotRun {
				t.Error("it says that it may have run")
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
		t.Errorf("%d ran at once, want 3", most.Load())
	}
	if _, err := call[int, int](client, "svc", "m", 1); err != nil {
		t.Error(err)
	}
}

// hammer calls from several goroutines until stop, and counts successes; failed is told of the errors.
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

func TestInstancesShareTheLoad(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	var handled [3]atomic.Int64
	var instances [3]*aegis.Service
	for i := range instances {
		instances[i] = newService(t, srv, "svc")
		handle(t, instances[i], "m", func(_ context.Context, s string) (string, error) {
			handled[i].Add(1)
			return s, nil
		})
		start(t, instances[i])
	}
	client := newService(t, srv, "client")
	stop := hammer(t, client, 16, "svc", "m", func(err error) { t.Error(err) })
	all := func() bool { return handled[0].Load() > 200 && handled[1].Load() > 200 && handled[2].Load() > 200 }
	eventually(t, "all three handle calls", all)
	if err := instances[1].Stop(t.Context()); err != nil {
		t.Error(err)
	}
	first, second := handled[0].Load(), handled[1].Load()
	eventually(t, "the others go on", func() bool { return handled[0].Load() > first+200 })
	if handled[1].Load() != second {
		t.Error("the stopped instance goes on handling")
	}
	if calls := stop(); calls != handled[0].Load()+handled[1].Load()+handled[2].Load() {
		t.Errorf("%d calls, handled %d + %d + %d", calls, handled[0].Load(), handled[1].Load(), handled[2].Load())
	}
}

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
	eventually(t, "calls fail at once", func() bool { return unavailable.Load() > 100 })
	again := startServer(t, samePort)
	eventually(t, "calls succeed again", func() bool {
		_, err := call[string, string](client, "svc", "m", "")
		return err == nil
	})
	eventually(t, "all connections are back", func() bool { return again.NumClients() == 5 })
	eventually(t, "all connections serve", func() bool {
		for range 30 {
			if _, err := call[string, string](client, "svc", "m", ""); err != nil {
				return false
			}
		}
		return true
	})
	stop()
}

func TestPoolSkipsWhatIsDown(t *testing.T) {
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
	eventually(t, "the user's handler is told", func() bool { return lost.Load() == 1 })
	for range 30 {
		if _, err := call[string, string](client, "svc", "m", ""); err != nil {
			t.Error(err)
		}
	}
}

// A responder that answers late, twice, and to calls that are long over must never get an answer to another call.
func TestLateAnswers(t *testing.T) {
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
	var old []held // calls that were not answered in time; only the subscription's goroutine uses it
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
	eventually(t, "many answers are late", func() bool { return late.Load() > 100 })
	if stop() == 0 {
		t.Error("no call was answered in time")
	}
}

func TestManyCallsAtOnce(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "m", func(_ context.Context, s string) (string, error) {
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
		return s, nil
	})
	start(t, svc)
	var calls atomic.Int64
	stop := hammer(t, client, 500, "svc", "m", func(err error) { t.Error(err) })
	eventually(t, "some time passes", func() bool { return calls.Add(1) > 200 })
	if n := stop(); n < 500 {
		t.Errorf("only %d calls", n)
	}
}

// A request that can't be sent fails as such in whatever company it is.
func TestTooLargeInACrowd(t *testing.T) {
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

// A peer that takes nothing any more holds up neither calls beyond their deadline nor Stop.
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
	if took := time.Since(begin); took > 8*time.Second { // nats.go holds them up for a flush and a connect, 2 s each, on both connections
		t.Errorf("calls with 0.5 s to live took %v", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	begin = time.Now()
	fails(t, client.Stop(ctx), aegis.ErrUnavailable)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("Stop with 1 s took %v", took)
	}
}

// A proxy stands between clients and a server, and can hold up what goes either way, or cut the connections.
type proxy struct {
	address string
	ended   chan struct{}

	mu     sync.Mutex // guards the rest
	held   map[way]chan struct{}
	conns  []net.Conn
	frozen net.Conn // a client's connection on which nothing goes any more
}

// freeze holds one connection, whatever heal does.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = p.conns[0]
}

type way int

const (
	toServer way = iota
	toClient
)

// hold keeps what goes these ways until heal.
func (p *proxy) hold(ways ...way) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range ways {
		if p.held[w] == nil {
			p.held[w] = make(chan struct{})
		}
	}
}

func (p *proxy) stall() { p.hold(toServer, toClient) }

func (p *proxy) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w, healed := range p.held {
		close(healed)
		delete(p.held, w)
	}
}

// cut closes all connections; with what is held.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

func (p *proxy) holding(w way, client net.Conn) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.frozen == client {
		return p.ended
	}
	return p.held[w]
}

func startProxy(tb testing.TB, srv *server.Server) *proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &proxy{address: l.Addr().String(), ended: make(chan struct{}), held: map[way]chan struct{}{}}
	target := srv.Addr().String()
	tb.Cleanup(func() { l.Close(); p.cut(); p.heal(); close(p.ended) })
	carry := func(to, from net.Conn, w way, client net.Conn) {
		defer to.Close()
		defer from.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			for healed := p.holding(w, client); healed != nil; healed = p.holding(w, client) {
				select {
				case <-healed:
				case <-p.ended:
					return
				}
			}
			if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			go carry(out, in, toServer, in)
			go carry(in, out, toClient, in)
		}
	}()
	return p
}

// Late answers to many calls that were given up must leave room for the answer to the next.
func TestManyLateAnswersAtOnce(t *testing.T) {
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
	for len(requests) < 20 { // some may be given up before they are sent
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

// Whoever sends more than can be handled gets an answer to each request all the same.
func TestFlood(t *testing.T) {
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
	eventually(t, "each is answered", func() bool { return answers.Load() == requests })
	if refused.Load() < requests/2 {
		t.Errorf("only %d of %d were refused", refused.Load(), requests)
	}
}

// Stop with a connection down serves out what the others bring.
func TestStopWithAConnectionDown(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc", aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return time.Hour })))
	handle(t, svc, "m", echo)
	start(t, svc)
	other := newService(t, srv, "svc")
	handle(t, other, "m", echo)
	start(t, other)
	client := newService(t, srv, "client")
	stop := hammer(t, client, 16, "svc", "m", func(err error) { t.Error(err) })
	idle := func(n int) func() bool { return func() bool { return srv.NumClients() == n } }
	eventually(t, "all are connected", idle(6))
	time.Sleep(20 * time.Millisecond)
	stop()
	id, err := svc.Conn().GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.DisconnectClientByID(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one is gone", idle(5))
	stop = hammer(t, client, 16, "svc", "m", func(err error) { t.Error(err) })
	time.Sleep(20 * time.Millisecond)
	fails(t, svc.Stop(t.Context()), aegis.ErrUnavailable)
	if stop() == 0 {
		t.Error("no calls")
	}
}

// Retry, breaker, middleware.

// flaky fails the first calls: each instance of it can be asked how often it was called.
func flaky(failures int32, how func() error) (fn func(context.Context, int) (int, error), called *atomic.Int32) {
	called = new(atomic.Int32)
	return func(context.Context, int) (int, error) {
		if called.Add(1) <= failures {
			return 0, how()
		}
		return 7, nil
	}, called
}

// An attempt that the end of ctx cuts short doesn't hide what the one before it has found out.
func TestGivingUpTellsWhatIsKnown(t *testing.T) {
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
	eventually(t, "some attempts", func() bool { return sent() > before+8 })
	if _, err := nc.Subscribe("$SRV.INFO.never", func(*nats.Msg) {}); err != nil { // so that nobody tells why any more
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
	policy := aegis.RetryPolicy{Attempts: 4, Backoff: time.Millisecond, AttemptTimeout: time.Second}

	// What ran is not sent again, whatever its error says.
	fn, called := flaky(99, func() error { return &aegis.Error{Code: "UNAVAILABLE", NotRun: true} })
	handle(t, svc, "ran", fn)
	slow, slowCalled := flaky(1, func() error { time.Sleep(1200 * time.Millisecond); return nil })
	handle(t, svc, "slow", slow)
	start(t, svc)
	for _, opts := range [][]aegis.CallOption{{aegis.Retry(policy)}, {aegis.Sticky()}, {aegis.Idempotent(), aegis.Retry(policy)}} {
		called.Store(0)
		_, err := call[int, int](client, "svc", "ran", 1, opts...)
		if e := fails(t, err, aegis.ErrUnavailable); e.NotRun || called.Load() != 1 {
			t.Errorf("called %d times, %+v", called.Load(), e)
		}
	}

	// A missing answer is waited for, unless the call is idempotent.
	if got, err := call[int, int](client, "svc", "slow", 1, aegis.Retry(policy)); got != 0 || err != nil || slowCalled.Load() != 1 {
		t.Errorf("got %d, %v after %d calls", got, err, slowCalled.Load())
	}
	slowCalled.Store(0)
	if got, err := call[int, int](client, "svc", "slow", 1, aegis.Idempotent(), aegis.Retry(policy)); got != 7 || err != nil || slowCalled.Load() != 2 {
		t.Errorf("got %d, %v after %d calls", got, err, slowCalled.Load())
	}

	// What did not reach a handler is sent again.
	started := time.Now()
	_, err := call[int, int](client, "late", "m", 1, aegis.Retry(policy))
	if e := fails(t, err, aegis.ErrUnavailable, "late"); !e.NotRun {
		t.Error("it says that it may have run")
	}
	if time.Since(started) > 2*time.Second {
		t.Error("retrying took", time.Since(started))
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

	// Giving up says why, and that nothing ran, unless an attempt was still unanswered.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = aegis.Call[int, int](ctx, client, "never", "m", 1, aegis.Sticky())
	if e := fails(t, err, aegis.ErrTimeout, "never is not running"); !e.NotRun && strings.HasPrefix(e.Message, "gave up") || !errors.Is(err, aegis.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %+v", e)
	}

	// Once an attempt may have run, the call may have, even if the last attempt did not.
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
		t.Error("the first attempt ran, and the error says that none did")
	}
}

func TestBreaker(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	client := newService(t, srv, "client", aegis.WithBreaker(aegis.BreakerPolicy{Failures: 3, Cooldown: 100 * time.Millisecond}))
	for range 3 {
		_, err := call[int, int](client, "svc", "m", 1)
		fails(t, err, aegis.ErrUnavailable)
	}
	_, err := call[int, int](client, "svc", "m", 1)
	if e := fails(t, err, aegis.ErrCircuitOpen, "svc", "3 times"); !e.NotRun {
		t.Error("it says that it may have run")
	}
	_, err = call[int, int](client, "other", "m", 1)
	fails(t, err, aegis.ErrUnavailable) // has a breaker of its own

	svc := newService(t, srv, "svc")
	inside, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "m", func(context.Context, int) (int, error) {
		close(inside)
		<-release
		return 7, nil
	})
	handle(t, svc, "refuse", func(context.Context, int) (int, error) { return 0, errors.New("no") })
	start(t, svc)
	probe := make(chan error)
	go func() {
		_, err := call[int, int](client, "svc", "m", 1, aegis.Sticky())
		probe <- err
	}()
	<-inside
	_, err = call[int, int](client, "svc", "m", 1) // one probe at a time
	fails(t, err, aegis.ErrCircuitOpen)
	close(release)
	if err := <-probe; err != nil {
		t.Error(err)
	}
	for range 10 { // what a handler returns doesn't count
		_, err := call[int, int](client, "svc", "refuse", 1)
		fails(t, err, aegis.ErrInternal)
	}
	for range 10 { // nor does a caller's cancel
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := aegis.Call[int, int](ctx, client, "svc", "refuse", 1)
		fails(t, err, aegis.ErrCanceled)
	}
	_, err = call[int, int](client, "svc", "refuse", 1)
	fails(t, err, aegis.ErrInternal)
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
		t.Error("it did not reach the handler, and the error doesn't say so")
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

// Codecs.

type everything struct {
	B     bool
	I     int64 `json:"i"`
	U     uint8
	F     float64
	S     string `json:"s,omitempty"`
	D     []byte
	L     []string
	M     map[string]int
	P     *everything `json:"p,omitempty"`
	T     time.Time
	Any   any
	Skip  string `json:"-"`
	inner int
}

func TestCodecs(t *testing.T) {
	t.Parallel()
	in := everything{B: true, I: -5, U: 200, F: 1.5, S: "ü", D: []byte{0, 255}, L: []string{"a", ""}, M: map[string]int{"x": 1},
		P: &everything{S: "deep"}, T: time.Unix(1e9, 5).UTC(), Any: "a", Skip: "skipped", inner: 3}
	want := in
	want.Skip, want.inner = "", 0
	for _, c := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
		data, err := c.Marshal(&in)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := c.Marshal(&in)
		if !bytes.Equal(data, again) {
			t.Errorf("%s: equal values differ in bytes", c.ContentType())
		}
		var out everything
		if err := c.Unmarshal(data, &out); err != nil {
			t.Fatal(err)
		}
		out.T, out.P.T = out.T.UTC(), out.P.T.UTC()
		want := want
		want.P = out.P
		if out.P.S != "deep" || !reflect.DeepEqual(out, want) {
			t.Errorf("%s: got %+v, want %+v", c.ContentType(), out, want)
		}
		var raw map[string]any
		if err := c.Unmarshal(data, &raw); err != nil || raw["s"] != "ü" || raw["Skip"] != nil {
			t.Errorf("%s: got %v, %v", c.ContentType(), raw, err)
		}
	}
}

func TestMsgPackRefuses(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"nothing":               {},
		"a byte without use":    {0xc1},
		"two values":            {1, 2},
		"half a float":          {0xcb, 1, 2, 3},
		"half a string":         {0xd9, 5, 'a'},
		"half a length":         {0xdb, 0, 0},
		"an array of 4 billion": {0xdd, 0xff, 0xff, 0xff, 0xff},
		"a map of 4 billion":    {0xdf, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"bytes of 4 GB":         {0xc6, 0xff, 0xff, 0xff, 0xff, 1},
		"an extension of 4 GB":  {0xc9, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"a million levels":      append(bytes.Repeat([]byte{0x91}, 1_000_000), 1),
		"129 levels":            append(bytes.Repeat([]byte{0x91}, 129), 1),
		"a map short of one":    {0x82, 1, 1, 2},
		"an unhashable key":     {0x81, 0x91, 1, 1},
	} {
		var m map[any]any
		if err := aegis.MsgPack.Unmarshal(data, &m); err == nil {
			t.Errorf("%s: no error", name)
		}
		var v any
		if err := aegis.MsgPack.Unmarshal(data, &v); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	var v any
	if err := aegis.MsgPack.Unmarshal(append(bytes.Repeat([]byte{0x91}, 128), 1), &v); err != nil {
		t.Error(err)
	}
}

// FuzzMsgPack checks that hostile bytes cost no more memory than their length warrants, and no panic.
func FuzzMsgPack(f *testing.F) {
	for _, v := range []any{1, "s", []int{1, 2}, map[string]any{"i": 1, "L": []string{"a"}, "P": map[string]any{"M": map[string]int{"x": 1}}}, everything{}} {
		data, err := aegis.MsgPack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'L', 0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'M', 0xdf, 0x00, 0xff, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0x91}, 200))
	element := uint64(reflect.TypeFor[everything]().Size())
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var list []everything
		_ = aegis.MsgPack.Unmarshal(data, &list)
		var one everything
		_ = aegis.MsgPack.Unmarshal(data, &one)
		var v any
		_ = aegis.MsgPack.Unmarshal(data, &v)
		runtime.ReadMemStats(&after)
		if got, most := after.TotalAlloc-before.TotalAlloc, 256<<10+uint64(len(data))*4*element; got > most {
			t.Errorf("%d bytes of input took %d bytes of memory, want at most %d", len(data), got, most)
		}
	})
}

// FuzzRequest sends what it likes, with a reply subject and headers of its own, and expects the service to answer and live on.
func FuzzRequest(f *testing.F) {
	srv := startServer(f)
	svc := newService(f, srv, "svc")
	handle(f, svc, "m", func(_ context.Context, e everything) (everything, error) { return e, nil })
	start(f, svc)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(nc.Close)
	f.Add([]byte("{}"), "_INBOX.client.ABCDEFGHIJKL.1.1.1000", "Content-Type", "application/json")
	f.Add([]byte{0x80}, "_INBOX.client.ABCDEFGHIJKL.1.1-corr.99999999999999", "traceparent", "x")
	f.Add([]byte{0xc1}, "...", "Nats-Service-Error-Code", "500")
	f.Add([]byte("x"), "a.1", "Aegis-Correlation-Id", "x y")
	f.Add([]byte("5"), "5", "X", "")
	f.Add([]byte(".5"), ".5", "X", "")
	f.Fuzz(func(t *testing.T, data []byte, reply, key, value string) {
		_ = nc.PublishMsg(&nats.Msg{Subject: "rpc.svc.m", Reply: reply, Data: data, Header: nats.Header{key: {value}}})
		_ = nc.Publish("rpc.svc.$cancel", data)
		_ = nc.Publish("rpc.svc.$cancel", []byte(reply))
		m, err := nc.RequestMsg(&nats.Msg{Subject: "rpc.svc.m", Data: data, Header: nats.Header{"X": {"1"}}}, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if code := m.Header.Get("Nats-Service-Error-Code"); code != "" && code != "400" {
			t.Errorf("got %s", m.Header)
		}
	})
}

// FuzzAnswer gives a caller hostile answers.
func FuzzAnswer(f *testing.F) {
	srv := startServer(f)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(nc.Close)
	var answer atomic.Pointer[nats.Msg]
	if _, err := nc.Subscribe("rpc.svc.m", func(m *nats.Msg) { _ = m.RespondMsg(answer.Load()) }); err != nil {
		f.Fatal(err)
	}
	client := newService(f, srv, "client")
	f.Add([]byte("{}"), "Nats-Service-Error-Code", "404")
	f.Add([]byte{0x81, 0xa4, 'c', 'o', 'd', 'e', 0xa1, 'X'}, "Nats-Service-Error-Code", "")
	f.Add([]byte{}, "Status", "503")
	f.Add([]byte{0xc1}, "Content-Type", "application/json")
	f.Fuzz(func(t *testing.T, data []byte, key, value string) {
		if strings.ContainsAny(key, ": \r\n") || key == "" {
			key = "X"
		}
		answer.Store(&nats.Msg{Data: data, Header: nats.Header{key: {value}}})
		_, err := aegis.Call[int, everything](t.Context(), client, "svc", "m", 1, aegis.Retry(aegis.RetryPolicy{Attempts: 1}))
		var e *aegis.Error
		if err != nil && (!errors.As(err, &e) || err.Error() == "") {
			t.Errorf("got %#v", err)
		}
		if errors.Is(err, context.DeadlineExceeded) && e.Source == "" {
			t.Errorf("no answer: %v", err)
		}
	})
}

// Events.

// withJetStream gives startServer a store, which it keeps when it is used again.
func withJetStream(tb testing.TB) func(*server.Options) {
	dir := tb.TempDir()
	return func(o *server.Options) { o.JetStream, o.StoreDir = true, dir }
}

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

// A journal is what handlers wrote down.
type journal[T any] struct {
	mu      sync.Mutex
	entries []T
}

func (l *journal[T]) add(v T) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, v)
}

func (l *journal[T]) all() []T {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.entries)
}

// wait waits until there are n entries.
func (l *journal[T]) wait(tb testing.TB, n int) []T {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); len(l.all()) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("never %d entries: %v", n, l.all())
		}
	}
	return l.all()
}

// into is a handler that writes down the payload of each event.
func into[T any](l *journal[T]) func(context.Context, aegis.Event[T]) error {
	return func(_ context.Context, e aegis.Event[T]) error {
		l.add(e.Data)
		return nil
	}
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}

// manage is JetStream's own interface, for what an operator does.
func manage(tb testing.TB, srv *server.Server) jetstream.JetStream {
	tb.Helper()
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		tb.Fatal(err)
	}
	return js
}

// shortenAckWait does so to the consumers of a stream.
func shortenAckWait(tb testing.TB, srv *server.Server, stream string, wait time.Duration) {
	tb.Helper()
	st, err := manage(tb, srv).Stream(context.Background(), stream)
	if err != nil {
		tb.Fatal(err)
	}
	consumers := st.ListConsumers(context.Background())
	for info := range consumers.Info() {
		info.Config.AckWait = wait
		if _, err := st.UpdateConsumer(context.Background(), info.Config); err != nil {
			tb.Fatal(err)
		}
	}
	if err := consumers.Err(); err != nil {
		tb.Fatal(err)
	}
}

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

func TestEvent(t *testing.T) {
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
			for n := range 130 { // one byte doesn't tell the codec
				publish(t, publisher, "number", "one", n)
			}
			numbers.wait(t, 130)
			if err := svc.Stop(t.Context()); err != nil { // the next subtest's events aren't for it
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

func TestPatterns(t *testing.T) {
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
	listen(b, "b payment.*", "payment.*") // another service gets all of them, too
	listen(a, "a payment.* again", "payment.*", aegis.Durable("again"))
	fails(t, aegis.Subscribe(a, "payment.*", into(&journal[string]{})), aegis.ErrInvalid, "payment.*", "Durable")
	fails(t, aegis.Subscribe(a, "order.>", into(&journal[string]{}), aegis.Durable("again")), aegis.ErrInvalid, "again")
	start(t, a)
	start(t, b)
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
	publish(t, a, "last", "one", "last") // by then the others would have had more
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
	eventually(t, "all are handled", func() bool { return len(shared[0].all())+len(shared[1].all())+len(shared[2].all()) >= len(want) })
	all := slices.Concat(shared[0].all(), shared[1].all(), shared[2].all())
	slices.Sort(all)
	if !slices.Equal(all, want) {
		t.Errorf("the instances got %v", all)
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
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().State.Consumers; n != 1 { // the shared one
		t.Errorf("%d consumers are left", n)
	}
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
				all = all[1:] // the first one, 1
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
	publish(t, publisher, "order", "created", 3) // while nobody listens
	run(2, 3, 4)
}

func TestEventIsRetriedThenSetAside(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, other := newService(t, srv, "risk"), newService(t, srv, "audit")
	ways := map[string]func() error{
		"error": func() error { return &aegis.Error{Code: "NO_LIMIT", Message: "no limit set"} },
		"panic": func() error { panic("ouch") },
		"exit":  func() error { runtime.Goexit(); return nil },
	}
	var attempts journal[aegis.Event[string]]
	var mended atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
		attempts.add(e)
		if way := ways[e.Data]; way != nil && !mended.Load() {
			return way()
		}
		return nil
	}, aegis.Attempts(3), aegis.Backoff(time.Millisecond, 5*time.Millisecond))
	var others journal[string]
	subscribe(t, other, ">", into(&others))
	subscribe(t, svc, "*.created", into(&others), aegis.Broadcast())
	start(t, svc)
	start(t, other)

	reasons := map[string]string{"error": "NO_LIMIT: no limit set", "panic": "ouch", "exit": "Goexit"}
	for data := range ways {
		publish(t, other, "order", "created", data, aegis.IdempotencyKey(data), aegis.EventVersion("2.0"))
	}
	var letters []aegis.DeadLetter
	eventually(t, "three dead letters", func() bool { letters = deadLetters(t, svc); return len(letters) == 3 })
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

	// Redriven, it reaches the consumer that failed it and no other, as it was but for the sequence.
	mended.Store(true)
	first := attempts.all()[0]
	i := slices.IndexFunc(letters, func(d aegis.DeadLetter) bool { return bytes.HasSuffix(d.Data, []byte(first.Data)) })
	if err := other.Redrive(t.Context(), letters[i]); err != nil {
		t.Fatal(err)
	}
	again := attempts.wait(t, 10)[9]
	if again.Sequence <= first.Sequence {
		t.Errorf("sequence %d after %d", again.Sequence, first.Sequence)
	}
	again.Sequence = first.Sequence
	if !again.Time.Equal(first.Time) {
		t.Errorf("time %v, was %v", again.Time, first.Time)
	}
	again.Time = first.Time
	if !reflect.DeepEqual(again, first) {
		t.Errorf("got %+v, was %+v", again, first)
	}
	if left := deadLetters(t, other); len(left) != 2 {
		t.Errorf("left are %+v", left)
	}
	fails(t, other.Redrive(t.Context(), letters[i]), aegis.ErrNotFound, "dead letter "+strconv.FormatUint(letters[i].Sequence, 10))
	fails(t, other.Redrive(t.Context(), aegis.DeadLetter{}), aegis.ErrInvalid)
	publish(t, other, "user", "created", "last")
	others.wait(t, 8)
	if n := len(others.all()); n != 8 {
		t.Errorf("others got %v", others.all())
	}

	// What fails again is set aside again, and can be redriven again, mended.
	mended.Store(false)
	i = (i + 1) % 3
	if err := svc.Redrive(t.Context(), letters[i]); err != nil {
		t.Fatal(err)
	}
	attempts.wait(t, 13)
	eventually(t, "it is set aside again", func() bool { letters = deadLetters(t, svc); return len(letters) == 2 })
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

func TestUndecodableEventIsSetAsideAtOnce(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[Order]
	subscribe(t, svc, "order.*", into(&got), aegis.Backoff(time.Minute, time.Minute))
	start(t, svc)
	publish(t, svc, "order", "created", []int{1, 2})
	publish(t, svc, "order", "created", Order{SKU: "x"})
	var letters []aegis.DeadLetter
	eventually(t, "it is set aside", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	if d := letters[0]; d.Attempts != 1 || !strings.Contains(d.Reason, "INVALID_ARGUMENT") || !strings.Contains(d.Reason, "Order") {
		t.Errorf("got %+v", d)
	}
	got.wait(t, 1)
}

func TestPublishIsStoredOnce(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var got journal[aegis.Event[int]]
	subscribe(t, svc, ">", func(_ context.Context, e aegis.Event[int]) error { got.add(e); return nil })
	start(t, svc)
	for range 3 {
		publish(t, svc, "order", "created", 1, aegis.IdempotencyKey("42"))
		publish(t, svc, "order", "paid", 1, aegis.IdempotencyKey("42")) // not the same event
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
	ids[0] = strings.Fields(ids[0])[0] // its id is random
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
	batch[17], batch[4711] = make([]byte, 64<<10), make([]byte, 63<<10) // too large by itself, and with its dead letter's headers
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

func TestEventsTravelWithContext(t *testing.T) {
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
			t.Errorf("headers %v", h)
		}
		if deadline, ok := ctx.Deadline(); !ok || time.Until(deadline) > time.Minute || time.Until(deadline) < 50*time.Second {
			t.Errorf("deadline %v", deadline)
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
			t.Errorf("traceparent %q", tp)
		}
		return n, nil
	})
	start(t, svc)
	ctx := aegis.WithHeader(aegis.WithHeader(t.Context(), "traceparent", traceparent), "X-Token", "secret")
	if err := aegis.Publish(ctx, svc, "order", "created", 1, aegis.IdempotencyKey("order-1")); err != nil {
		t.Fatal(err)
	}
	if got := ids.wait(t, 3); !slices.Equal(got, []string{"order-1", "order-1", "order-1"}) {
		t.Errorf("correlation ids %v", got)
	}
	want := []string{"event events.order.created risk secret", "event events.order.checked risk ", "rpc rpc.risk.check risk "}
	if got := seen.all(); !slices.Equal(got, want) {
		t.Errorf("middleware saw %q", got)
	}
}

func TestLongHandlerIsNotRedelivered(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var handled journal[int]
	instance := func() *aegis.Service {
		svc := newService(t, srv, "risk")
		subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[time.Duration]) error {
			handled.add(e.Attempt)
			time.Sleep(e.Data)
			return nil
		}, aegis.Concurrency(2))
		start(t, svc)
		return svc
	}
	if err := instance().Stop(t.Context()); err != nil { // once the consumer exists, its operator can change it
		t.Fatal(err)
	}
	shortenAckWait(t, srv, "AEGIS_EVENTS", time.Second)
	svc := instance()
	publish(t, svc, "order", "created", 4*time.Second)
	handled.wait(t, 1)
	instance()                                    // which would take it
	if err := svc.Stop(t.Context()); err != nil { // waits for the handler
		t.Fatal(err)
	}
	if got := handled.all(); !slices.Equal(got, []int{1}) {
		t.Errorf("attempts %v", got)
	}
}

// As many events are handled as may be, however few of them are free.
func TestEventsUseTheWholeConcurrency(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	var running atomic.Int32
	release := make(chan struct{})
	subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error {
		running.Add(1)
		<-release
		return nil
	}, aegis.Concurrency(64))
	start(t, svc)
	for i := range 63 {
		publish(t, svc, "order", "created", i)
	}
	eventually(t, "63 run", func() bool { return running.Load() == 63 })
	time.Sleep(1500 * time.Millisecond) // until what was asked for has expired
	if err := aegis.PublishBatch(t.Context(), svc, "order", "created", make([]int, 100)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "64 run", func() bool { return running.Load() == 64 })
	close(release)
	eventually(t, "all run", func() bool { return running.Load() == 163 })
}

func TestStopGivesEventsBackWithoutUsingAnAttempt(t *testing.T) {
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
			if e.Data == 2 { // longer than Stop waits
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
			t.Errorf("%d handlers were told", n)
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

func TestPublishWhileTheServerIsAway(t *testing.T) {
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

func TestStreamsThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	try := func(name string, words []string, configs ...jetstream.StreamConfig) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			js := manage(t, srv)
			for _, c := range configs {
				if _, err := js.CreateStream(t.Context(), c); err != nil {
					t.Fatal(err)
				}
			}
			svc := newService(t, srv, "risk")
			var got journal[int]
			subscribe(t, svc, "order.*", into(&got))
			err := svc.Start(t.Context())
			if words != nil {
				fails(t, err, aegis.ErrInvalid, words...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			publish(t, svc, "order", "created", 1)
			got.wait(t, 1)
			for _, c := range configs {
				st, err := js.Stream(t.Context(), c.Name)
				if err != nil {
					t.Fatal(err)
				}
				if have := st.CachedInfo().Config; !slices.Equal(have.Subjects, c.Subjects) || have.MaxAge != c.MaxAge {
					t.Errorf("it was changed: %+v", have)
				}
			}
		})
	}
	try("an operator's", nil, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, MaxAge: time.Hour})
	try("other subjects", []string{"AEGIS_EVENTS", "events.order.*", "events.>"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.payment.>"}})
	try("no acks", []string{"no_ack"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, NoAck: true})
	try("a work queue", []string{"workqueue", "retention"}, jetstream.StreamConfig{Name: "AEGIS_EVENTS", Subjects: []string{"events.>"}, Retention: jetstream.WorkQueuePolicy})
	try("dead letters without TTL", []string{"AEGIS_DEAD", "allow_msg_ttl"}, jetstream.StreamConfig{Name: "AEGIS_DEAD", Subjects: []string{"aegis.dead.>"}})
	try("another stream has the subjects", []string{"AEGIS_EVENTS", "overlap"}, jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"events.order.>"}})
}

func TestEventsWithoutJetStream(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "risk")
	promptly(t, func() {
		if e := fails(t, aegis.Publish(t.Context(), svc, "order", "created", 1), aegis.ErrUnavailable, "JetStream", "-js"); !e.NotRun {
			t.Error("it may have been stored?")
		}
	})
	promptly(t, func() {
		fails(t, aegis.PublishBatch(t.Context(), svc, "order", "created", []int{1}), aegis.ErrUnavailable, "JetStream")
	})
	for _, err := range svc.DeadLetters(t.Context()) {
		fails(t, err, aegis.ErrUnavailable, "JetStream")
	}
	subscribe(t, svc, "order.*", into(&journal[int]{}))
	promptly(t, func() { fails(t, svc.Start(t.Context()), aegis.ErrUnavailable, "JetStream") })
}

func TestInvalidEvents(t *testing.T) {
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

func TestDeletedConsumerIsMadeAgain(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	js := manage(t, srv)
	svc, publisher := newService(t, srv, "risk"), newService(t, srv, "shop")
	var got journal[int]
	var healthy atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		if e.Data == 1 && !healthy.Load() {
			return errors.New("not yet")
		}
		got.add(e.Data)
		return nil
	}, aegis.Backoff(time.Hour, time.Hour))
	start(t, svc)
	publish(t, publisher, "order", "created", 1) // it fails, and waits for its next attempt
	publish(t, publisher, "order", "created", 2)
	got.wait(t, 1)
	st, err := js.Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	for name := range st.ConsumerNames(t.Context()).Name() {
		if err := st.DeleteConsumer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	healthy.Store(true)
	publish(t, publisher, "order", "created", 3) // while there is none, perhaps
	eventually(t, "all are handled", func() bool { return slices.Contains(got.all(), 1) && slices.Contains(got.all(), 3) })

	// The same with the stream, whose numbers begin anew.
	if err := js.DeleteStream(t.Context(), "AEGIS_EVENTS"); err != nil {
		t.Fatal(err)
	}
	publish(t, publisher, "order", "created", 4)
	eventually(t, "the event in the new stream is handled", func() bool { return slices.Contains(got.all(), 4) })
}

func TestOperatorsConsumer(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	publish(t, svc, "other", "one", 0)
	st, err := manage(t, srv).Stream(t.Context(), "AEGIS_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
		Durable: "risk~order~+", FilterSubject: "events.order.*", AckPolicy: jetstream.AckExplicitPolicy, MaxRequestBatch: 7, MaxRequestExpires: 200 * time.Millisecond,
	}); err != nil {
		t.Fatal(err)
	}
	var got journal[int]
	var healthy atomic.Bool
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		if e.Data == 1 && !healthy.Load() {
			return errors.New("no")
		}
		got.add(e.Data)
		return nil
	}, aegis.Attempts(1))
	start(t, svc)
	if err := aegis.PublishBatch(t.Context(), svc, "order", "created", make([]int, 100)); err != nil {
		t.Fatal(err)
	}
	got.wait(t, 100)
	publish(t, svc, "order", "created", 1)
	var letters []aegis.DeadLetter
	eventually(t, "a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	healthy.Store(true)
	if err := svc.Redrive(t.Context(), letters[0]); err != nil { // for which the consumer's filter had to be extended
		t.Fatal(err)
	}
	got.wait(t, 101)

	if _, err := st.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "risk~limited", FilterSubject: "events.order.*", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 3}); err != nil {
		t.Fatal(err)
	}
	fails(t, aegis.Subscribe(svc, "order.*", into(&got), aegis.Durable("limited")), aegis.ErrInvalid, "risk~limited", "max_deliver")
}

// As long as dead letters can't be stored, their events wait; then they have the true reason.
func TestDeadLettersWhileTheirStreamIsOutOfOrder(t *testing.T) {
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
	takes := func(subject string) {
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
	takes("nothing.>")
	publish(t, svc, "order", "created", 1)
	got.wait(t, 2)
	time.Sleep(100 * time.Millisecond) // for it to try; the test holds if it doesn't
	takes("aegis.dead.>")
	var letters []aegis.DeadLetter
	eventually(t, "a dead letter", func() bool { letters = deadLetters(t, svc); return len(letters) == 1 })
	if d := letters[0]; d.Attempts != 2 || !strings.Contains(d.Reason, "the true reason") || len(got.all()) != 2 {
		t.Errorf("%d attempts, %+v", len(got.all()), d)
	}
}

// Events of other clients can be such that nats.go wouldn't send them, or too large to be copied.
func TestDeadLettersOfOddEvents(t *testing.T) {
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
	eventually(t, "two dead letters", func() bool { letters = deadLetters(t, svc); return len(letters) == 2 })
	if d := letters[0]; string(d.Data) != "??" || d.Header.Get("X-Good") != "y" || d.Header.Get("Nats-Expected-Last-Sequence") != "" {
		t.Errorf("got %+v", d)
	}
	if d := letters[1]; len(d.Data) != 0 || !strings.Contains(d.Reason, "sequence 2 of AEGIS_EVENTS") || !strings.Contains(d.Reason, "INVALID_ARGUMENT") {
		t.Errorf("got %+v", d)
	}
}

func TestPublishBatchThatCannotSucceed(t *testing.T) {
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
				t.Error("it may have been stored?")
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if e := fails(t, aegis.PublishBatch(ctx, svc, "order", "created", make([]int, 500)), aegis.ErrCanceled); !e.NotRun {
		t.Error("it may have been stored?")
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

// What was sent once may have been stored, whatever came of it later.
func TestPublishBatchNotRun(t *testing.T) {
	t.Parallel()
	srv := startServer(t) // without JetStream
	svc := newService(t, srv, "risk")
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	var n atomic.Int32
	if _, err := nc.Subscribe("events.>", func(m *nats.Msg) { // takes three events, answers the first only, and goes away
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
			t.Errorf("got %+v: it was sent", e)
		}
	}
}

// Crashes: handlers in processes of their own.

// A process is this test's binary, run once more in a role of runChild's.
type process struct {
	*exec.Cmd
	lines chan string   // that it prints
	told  <-chan string // what startLeader leaves of them
	input io.WriteCloser
}

// startProcess runs a child, with settings as environment variables, that ends with the test.
func startProcess(tb testing.TB, role string, srv *server.Server, settings ...string) *process {
	tb.Helper()
	p := &process{Cmd: exec.Command(os.Args[0]), lines: make(chan string, 1<<16)}
	p.Env = append(append(os.Environ(), "AEGIS_TEST_CHILD="+role, "NATS_URL="+srv.ClientURL()), settings...)
	p.Stderr = os.Stderr
	in, err := p.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	p.input = in
	out, err := p.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := p.Start(); err != nil {
		tb.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(p.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	tb.Cleanup(func() {
		_ = p.Process.Kill() // it may have ended
		<-read
		_ = p.Wait()
	})
	return p
}

// line waits for the next line, not ok if the process has ended.
func (p *process) line(tb testing.TB) (line string, ok bool) {
	tb.Helper()
	select {
	case line, ok = <-p.lines:
	case <-time.After(20 * time.Second):
		tb.Fatal("the child prints nothing")
	}
	return line, ok
}

// runChild plays a role; it ends when its standard input does.
func runChild(role string) int {
	name := "risk"
	opts := []aegis.Option{aegis.WithLogger(slog.New(slog.DiscardHandler))}
	switch role {
	case "senders":
		name = "shop"
	case "soak":
		opts = append(opts, aegis.WithFailover(aegis.Aggressive), aegis.WithHeartbeat(time.Second))
	case "crashing":
		opts = append(opts, aegis.WithID("crashing"))
	case "leader":
		opts = append(opts, aegis.WithID("risk-"+strconv.Itoa(os.Getpid())), aegis.WithFailover(policies[os.Getenv("AEGIS_TEST_POLICY")]), aegis.WithHeartbeat(time.Second))
	}
	svc, err := aegis.New(name, opts...)
	if err == nil {
		switch role {
		case "crashing":
			err = aegis.Handle(svc, "who", func(context.Context, bool) (string, error) { return "crashing", nil })
		case "leader": // tells when it leads, and serves exclusively
			err = handleExclusively(svc)
			go reign(context.Background(), svc, func(r reignOf) { fmt.Println("reign", r.from, r.to) })
		case "idle":
			err = aegis.Handle(svc, "create_order", createOrder)
		case "soak":
			err = handleAll(svc)
		case "events": // prints each event; SLEEP and EXIT are what it does with one that says so
			err = aegis.Subscribe(svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
				fmt.Println(e.Data, e.Attempt)
				switch e.Data {
				case "SLEEP":
					time.Sleep(time.Hour)
				case "EXIT":
					os.Exit(3)
				}
				return nil
			}, aegis.Attempts(2))
		case "commands": // prints each attempt, and what it reported before; reports once, then goes on for ever, but for EXIT, PAUSED and SILENT
			err = aegis.HandleCommand(svc, "work", func(ctx context.Context, c *aegis.Command[string]) (string, error) {
				fmt.Println(c.Data, c.Attempt, c.Last.Message)
				err := c.Progress(50, "half of "+c.Data)
				switch c.Data {
				case "EXIT":
					os.Exit(3)
				case "SILENT":
					<-ctx.Done()
					fmt.Println("FENCED")
					return "the first", nil
				case "PAUSED": // until it is fenced
					for err == nil {
						time.Sleep(50 * time.Millisecond)
						err = c.Progress(60, "")
					}
					var e *aegis.Error
					errors.As(err, &e)
					fmt.Println(e.Code)
					return "the first", nil
				}
				time.Sleep(time.Hour)
				return "", err
			}, aegis.Attempts(2))
		}
	}
	if err == nil {
		err = svc.Start(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	if role == "senders" { // sends one command 25 times at once when it is told to, and prints the results
		_, _ = os.Stdin.Read(make([]byte, 1))
		for range 25 {
			go func() {
				j, err := aegis.SendCommand[int, int32](context.Background(), svc, "risk", "work", 7, aegis.IdempotencyKey("seven"))
				var n int32
				if err == nil {
					n, err = j.Wait(context.Background())
				}
				fmt.Println(n, err)
			}()
		}
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := svc.Stop(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func TestKilledInstance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	first := startProcess(t, "events", srv)
	if line, _ := first.line(t); line != "ready" {
		t.Fatal(line)
	}
	shortenAckWait(t, srv, "AEGIS_EVENTS", time.Second) // for those that start later
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

func TestEventThatKillsItsProcessIsSetAside(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	runs := 0
	for n := 0; ; n++ {
		p := startProcess(t, "events", srv)
		if n == 0 {
			if line, _ := p.line(t); line != "ready" {
				t.Fatal(line)
			}
			shortenAckWait(t, srv, "AEGIS_EVENTS", time.Second)
			publish(t, publisher, "order", "created", "EXIT")
		}
		var lines []string
		dead := false
		eventually(t, "the process dies, or the event is set aside", func() bool {
			select {
			case line, ok := <-p.lines:
				dead = dead || !ok
				lines = append(lines, line)
			default:
			}
			return dead || len(deadLetters(t, publisher)) > 0
		})
		for _, line := range lines {
			if strings.HasPrefix(line, "EXIT") {
				runs++
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
	if runs != 2 || len(letters) != 1 || letters[0].Attempts != 2 || !strings.Contains(letters[0].Reason, "never finished") {
		t.Errorf("%d runs, dead letters %+v", runs, letters)
	}
}

// A cluster.

// startCluster runs n servers with JetStream as one cluster.
func startCluster(tb testing.TB, n int) []*server.Server {
	tb.Helper()
	ports, routes := make([]int, n), make([]string, n)
	for i := range n {
		ports[i] = freePort(tb)
		routes[i] = fmt.Sprint("nats://127.0.0.1:", ports[i])
	}
	servers := make([]*server.Server, n)
	var starting sync.WaitGroup
	for i := range servers {
		store := withJetStream(tb)
		starting.Go(func() {
			servers[i] = startServer(tb, store, func(o *server.Options) {
				o.ServerName = fmt.Sprint("n", i)
				o.Cluster = server.ClusterOpts{Name: "c", Host: "127.0.0.1", Port: ports[i]}
				o.Routes = server.RoutesFromStr(strings.Join(routes, ","))
			})
		})
	}
	starting.Wait()
	eventually(tb, "the cluster has a leader, and all follow it", func() bool {
		return slices.ContainsFunc(servers, func(s *server.Server) bool {
			return s.JetStreamIsLeader() && len(s.JetStreamClusterPeers()) == n
		})
	})
	return servers
}

func TestNoEventIsLostWithTheStreamLeader(t *testing.T) {
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
		t.Fatal("nobody leads the stream")
	}
	servers[leader].Shutdown()
	eventually(t, "events are stored without it", func() bool { return len(stored.all()) > n+500 })
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
			t.Fatalf("never handled: %v", missing())
		}
	}
}

// Commands.

func handleCommand[T, R any](tb testing.TB, s *aegis.Service, command string, fn func(context.Context, *aegis.Command[T]) (R, error), opts ...aegis.HandlerOption) {
	tb.Helper()
	if err := aegis.HandleCommand(s, command, fn, opts...); err != nil {
		tb.Fatal(err)
	}
}

func send[T, R any](tb testing.TB, s *aegis.Service, service, command string, data T, opts ...aegis.CallOption) *aegis.Job[R] {
	tb.Helper()
	j, err := aegis.SendCommand[T, R](context.Background(), s, service, command, data, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	return j
}

// updates collects what a job reports until it ends.
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
				for i := range 1000 { // faster than they are written
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
			if n := len(states); n < 2 || n > 12 || states[n-1] != "completed 99 nearly 1" || !slices.Contains(states, "running 25 a quarter 1") {
				t.Errorf("got %q", states)
			}
			if r := wait(t, j); r.ID != "x-k.1/"+name {
				t.Errorf("got %+v", r)
			}
			if got.ID != "k.1/"+name || got.Source != "shop" || got.Priority != aegis.High || got.Attempt != 1 || got.Fence == 0 || got.Data.SKU != "x" {
				t.Errorf("got %+v", got)
			}
			elsewhere := newService(t, srv, "ops", aegis.WithCodec(codec))
			if r := wait(t, aegis.Attach[Receipt](elsewhere, name, "rebalance", j.ID)); r.ID != "x-"+j.ID {
				t.Errorf("attached, got %+v", r)
			}
			for n := range 130 {
				if r := wait(t, send[int, int](t, client, name, "count", n)); r != n+1 {
					t.Fatalf("got %d after %d", r, n)
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
	var mended atomic.Bool
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) ([]byte, error) {
		attempts.add(fmt.Sprint(c.Data, " ", c.Attempt))
		switch {
		case c.Data == "panic":
			panic("ouch")
		case c.Data == "large":
			return make([]byte, 64<<10), nil
		case c.Data == "once" && c.Attempt == 1, c.Data == "never" && !mended.Load():
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
		t.Errorf("attempts %q", got)
	}
	letters := deadLetters(t, svc)
	if len(letters) != 4 || letters[0].Subject != "commands.risk.work" || letters[0].Attempts != 2 || !strings.Contains(letters[0].Reason, "NO_LIMIT") {
		t.Fatalf("dead letters %+v", letters)
	}

	mended.Store(true)
	if err := client.Redrive(t.Context(), letters[0]); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, never); string(r) != "never" {
		t.Errorf("got %q", r)
	}
	fails(t, client.Redrive(t.Context(), letters[0]), aegis.ErrNotFound)
	if n := len(deadLetters(t, svc)); n != 3 {
		t.Errorf("%d dead letters are left", n)
	}
}

func TestIdempotencyKeyRunsOnce(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	var runs atomic.Int32
	var instances []*aegis.Service
	for range 3 {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int32, error) {
			time.Sleep(20 * time.Millisecond) // so that some come while it runs
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
		t.Error("it may have run?")
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

func TestCancelCommand(t *testing.T) { // not beside others, since it measures
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var started journal[string]
	ended := make(chan time.Time, 1)
	handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[string]) (int, error) {
		started.add(c.Data)
		if c.Data == "quick" {
			return 1, nil
		}
		for ctx.Err() == nil { // reports more often than is written
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
		eventually(t, "it runs", func() bool { return slices.Contains(started.all(), data) })
		waiting := send[string, int](t, client, "risk", "work", "waits behind "+data)
		if err := waiting.Cancel(t.Context()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := running.Cancel(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := (<-ended).Sub(begin); took > 100*time.Millisecond {
			t.Errorf("%s ended after %v", data, took)
		}
		for _, j := range []*aegis.Job[int]{running, waiting} {
			fails(t, waitError(t, j), aegis.ErrCanceled, j.ID)
			if all := updates(t, j); all[len(all)-1].State != "canceled" {
				t.Errorf("got %+v", all)
			}
			if err := j.Cancel(t.Context()); err != nil { // once more
				t.Error(err)
			}
		}
	}
	quick := send[string, int](t, client, "risk", "work", "quick")
	if wait(t, quick) != 1 {
		t.Error("a later command")
	}
	fails(t, quick.Cancel(t.Context()), aegis.ErrInvalid, "completed")
	if got := started.all(); !slices.Equal(got, []string{"heeds", "stubborn", "quick"}) {
		t.Errorf("started %q", got)
	}
	if letters := deadLetters(t, svc); len(letters) > 0 {
		t.Errorf("dead letters %+v", letters)
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
	eventually(t, "the first is taken", func() bool {
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

	// However many critical ones there are, a low one gets its turn.
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

// The turn of the less urgent isn't lost to a level at which there is nothing.
func TestPatientCommandBelowWhichThereIsNone(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	var urgent, before atomic.Int32
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) {
		if time.Sleep(10 * time.Millisecond); c.Data == "patient" {
			before.Store(urgent.Load())
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
	if before.Load() > 40 {
		t.Errorf("it ran after %d more urgent ones", before.Load())
	}
}

func TestThousandCommandsAtOnce(t *testing.T) {
	t.Parallel()
	const n = 1000
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var now atomic.Int32
	release := make(chan struct{})
	instance := func() *aegis.Service {
		svc := newService(t, srv, "risk")
		handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) {
			now.Add(1)
			defer now.Add(-1)
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
	eventually(t, "all run", func() bool { return now.Load() == n })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	fails(t, svc.Stop(ctx), aegis.ErrTimeout)
	cancel()
	eventually(t, "all were told", func() bool { return now.Load() == 0 })
	close(release)
	second := instance()
	for i, j := range jobs { // each ran in vain once, which counts as nothing
		if r := wait(t, j); r != i*1000+1 {
			t.Fatalf("command %d: got %d", i, r)
		}
	}
	if letters := deadLetters(t, second); len(letters) > 0 {
		t.Errorf("%d dead letters", len(letters))
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
	nothing := aegis.Attach[string](client, "risk", "work", "nothing")
	fails(t, waitError(t, nothing), aegis.ErrNotFound, "nothing")
	start(t, svc)
	fails(t, waitError(t, nothing), aegis.ErrNotFound, "nothing")
	for _, err := range nothing.Updates(t.Context()) {
		fails(t, err, aegis.ErrNotFound)
	}
	fails(t, nothing.Cancel(t.Context()), aegis.ErrNotFound)

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
	for p, err := range j.Updates(t.Context()) { // a new one gets the final state at once
		if err != nil || p.State != "completed" || p.Message != "so far" {
			t.Errorf("got %+v, %v", p, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := j.Wait(ctx)
	fails(t, err, aegis.ErrCanceled)
}

// A command's sender and its worker get through a restart of the server.
func TestCommandThroughServerRestart(t *testing.T) {
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
	close(release) // it ends while there is no server
	startServer(t, samePort, store)
	if r := <-result; r != "done" {
		t.Errorf("got %q", r)
	}
	if runs.Load() != 1 {
		t.Errorf("%d runs", runs.Load())
	}
}

func TestInvalidCommands(t *testing.T) {
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
	never := func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil }
	fails(t, aegis.HandleCommand(svc, "no-command", never), aegis.ErrInvalid, "no-command")
	fails(t, aegis.HandleCommand[int, int](svc, "work", nil), aegis.ErrInvalid, "nil")
	fails(t, aegis.HandleCommand(svc, "work", never, aegis.Broadcast()), aegis.ErrInvalid, "Broadcast")
	handleCommand(t, svc, "work", never)
	fails(t, aegis.HandleCommand(svc, "work", never), aegis.ErrInvalid, "commands.risk.work")
	start(t, svc)
	other := newService(t, srv, "shop")
	_, err = aegis.SendCommand[int, int](ctx, other, "risk", "other", 1)
	if e := fails(t, err, aegis.ErrUnimplemented, "risk", "other"); !e.NotRun {
		t.Error("it may have run?")
	}
	if err := svc.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	_, err = aegis.SendCommand[int, int](ctx, svc, "risk", "work", 1)
	fails(t, err, aegis.ErrClosed)
	j := send[int, int](t, other, "risk", "work", 1) // nobody runs: it is queued
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	_, err = j.Wait(short)
	fails(t, err, aegis.ErrTimeout)
	_, err = aegis.SendCommand[int, int](ctx, newService(t, startServer(t), "shop"), "risk", "work", 1)
	fails(t, err, aegis.ErrUnavailable, "JetStream")
}

func TestCommandStreamsThatCannotBeUsed(t *testing.T) {
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

	// One that kills its process each time is set aside.
	if err := svc.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	exit := send[string, string](t, client, "risk", "work", "EXIT")
	for range 3 {
		p := startProcess(t, "commands", srv)
		eventually(t, "it dies, or the command has failed", func() bool {
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

// A worker that was paused for longer than its ack wait has lost its command: it learns of that, with or without reporting
// progress, and neither overwrites the outcome nor acknowledges the message.
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
		shortenAckWait(t, srv, "AEGIS_COMMANDS", time.Second) // for those that start later
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
			t.Errorf("attempt %d", n)
		}
		if err := paused.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if line, _ := paused.line(t); line != "FENCED" {
			t.Errorf("the one that was paused says %q", line)
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
			t.Error("it ran once more")
		}
		if err := svc.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := paused.Process.Kill(); err != nil {
			t.Error(err)
		}
	}
}

// A command that was queued again, and then sent again, has two messages, but runs once at a time.
func TestCommandWokenUpTwice(t *testing.T) {
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
	for i := range 20 { // whose order in the encoded data is random
		data[strconv.Itoa(i)] = i
	}
	first := instance(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	j := send[map[string]int, int](t, client, "risk", "work", data, aegis.IdempotencyKey("k"))
	eventually(t, "it runs", func() bool { return running.Load() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, first.Stop(ctx), aegis.ErrTimeout)
	eventually(t, "it was told", func() bool { return running.Load() == 0 })
	send[map[string]int, int](t, client, "risk", "work", data, aegis.IdempotencyKey("k"))
	for range 2 {
		instance(func(context.Context) error { time.Sleep(500 * time.Millisecond); return nil })
	}
	if r := wait(t, j); r != 1 || runs.Load() != 2 || overlaps.Load() != 0 {
		t.Errorf("result of attempt %d, %d runs, %d of them while another went on", r, runs.Load(), overlaps.Load())
	}
}

// As long as the dead letter can't be stored there is no outcome; Stop doesn't wait for it, and nothing is forgotten.
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
	eventually(t, "it runs", func() bool { return runs.Load() == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, svc.Stop(ctx), aegis.ErrTimeout)
	limitMessages(t, srv, "AEGIS_DEAD", -1)
	svc = instance()
	fails(t, waitError(t, j), aegis.ErrInternal, "the true reason")
	if runs.Load() != 1 {
		t.Errorf("%d runs", runs.Load())
	}

	// A Redrive that came only half of the way can be repeated.
	letter := deadLetters(t, svc)[0]
	limitMessages(t, srv, "AEGIS_COMMANDS", 1)
	if err := svc.Redrive(t.Context(), letter); err == nil {
		t.Error("it was redriven")
	}
	limitMessages(t, srv, "AEGIS_COMMANDS", -1)
	if err := svc.Redrive(t.Context(), letter); err != nil {
		t.Error(err)
	}
	eventually(t, "it runs again", func() bool { return runs.Load() == 2 })
}

// A command that was not sent, and that nobody can send again, leaves nothing that stays.
func TestCommandThatIsNotSentLeavesNoRecord(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk"), newService(t, srv, "shop")
	handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
	start(t, svc)
	limitMessages(t, srv, "AEGIS_COMMANDS", 1)
	_, err := aegis.SendCommand[int, int](t.Context(), client, "risk", "work", 1)
	if e := fails(t, err, aegis.ErrInvalid); !e.NotRun {
		t.Error("it may have run?")
	}
	st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_commands")
	if err != nil {
		t.Fatal(err)
	}
	m, err := st.GetLastMsgForSubject(t.Context(), "$KV.aegis_commands.risk.work.>")
	if err != nil || m.Header.Get("Nats-TTL") == "" {
		t.Errorf("the record stays: %v, %v", m, err)
	}
}

// A key joins senders of the same data, whatever they encode it with, and in whatever order their fields are.
func TestKeyJoinsAcrossEncodings(t *testing.T) {
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
				t.Errorf("%T: %d, %v", data, n, err)
			}
		}
		_, err := send(s, order{"x", amount + 1, limits})
		fails(t, err, aegis.ErrInvalid, "other data")
	}
	if n := runs.Load(); n != 1 {
		t.Errorf("it ran %d times", n)
	}
}

// limitMessages makes a stream refuse larger messages.
func limitMessages(tb testing.TB, srv *server.Server, stream string, size int32) {
	tb.Helper()
	js := manage(tb, srv)
	st, err := js.Stream(context.Background(), stream)
	if err != nil {
		tb.Fatal(err)
	}
	config := st.CachedInfo().Config
	config.MaxMsgSize = size
	if _, err := js.UpdateStream(context.Background(), config); err != nil {
		tb.Fatal(err)
	}
}

func TestOddCommands(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	answers := func(next aegis.HandlerFunc) aegis.HandlerFunc { // instead of the handler
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
	fails(t, waitError(t, aegis.Attach[int](client, "risk", "work", "bad")), aegis.ErrNotFound) // nothing is left behind
}

// Election.

var full = flag.Bool("full", false, "kill 20 leaders per failover policy, and soak for three minutes")

var policies = map[string]aegis.FailoverPolicy{"Aggressive": aegis.Aggressive, "Balanced": aegis.Balanced, "Conservative": aegis.Conservative}

// A reignOf is a time in which an instance believed, without a break, that it leads.
type reignOf struct {
	who      string
	term     uint64 // 0 if unknown
	from, to int64  // by the machine's clock, which all its processes share
}

// reign looks all the time whether s leads, and reports each reign at its end.
func reign(ctx context.Context, s *aegis.Service, report func(reignOf)) {
	for ctx.Err() == nil {
		r := reignOf{who: s.ID()}
		for ctx.Err() == nil {
			before := time.Now().UnixNano()
			if !s.IsLeader() {
				break
			}
			if r.to = before; r.from == 0 {
				r.from = time.Now().UnixNano()
			}
			time.Sleep(200 * time.Microsecond)
		}
		if r.from != 0 && r.to > r.from {
			report(r)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// checkReigns fails the test if two overlap, or a term went back.
func checkReigns(tb testing.TB, reigns []reignOf) {
	tb.Helper()
	slices.SortFunc(reigns, func(a, b reignOf) int { return cmp.Compare(a.from, b.from) })
	for i := 1; i < len(reigns); i++ {
		a, b := reigns[i-1], reigns[i]
		if b.from < a.to {
			tb.Errorf("%s and %s both led for %v", a.who, b.who, time.Duration(a.to-b.from))
		}
		if a.term != 0 && b.term != 0 && b.term <= a.term {
			tb.Errorf("term %d of %s came after %d of %s", b.term, b.who, a.term, a.who)
		}
	}
}

// A contest is instances of one service that campaign, watched.
type contest struct {
	reigns  journal[reignOf]
	elected atomic.Int32 // terms that began
	stop    context.CancelFunc
	members []*aegis.Service
	all     sync.WaitGroup
}

// compete has them campaign until the test ends, or stop and wait.
func compete(tb testing.TB, p aegis.FailoverPolicy, members ...*aegis.Service) *contest {
	ctx, cancel := context.WithCancel(context.Background())
	c := &contest{stop: cancel, members: members}
	for _, s := range members {
		c.all.Go(func() {
			err := s.Lead(ctx, "default", p, func(ctx context.Context, term uint64) error {
				c.elected.Add(1)
				if aegis.Term(ctx) != term {
					tb.Errorf("Term is %d in term %d", aegis.Term(ctx), term)
				}
				r := reignOf{who: s.ID(), term: term}
				for {
					before := time.Now().UnixNano()
					if !s.IsLeader() {
						break
					}
					if r.to = before; r.from == 0 {
						r.from = time.Now().UnixNano()
					}
					if ctx.Err() != nil {
						break
					}
					time.Sleep(200 * time.Microsecond)
				}
				if r.from != 0 && r.to > r.from {
					c.reigns.add(r)
				}
				<-ctx.Done()
				return ctx.Err()
			})
			if !errors.Is(err, aegis.ErrCanceled) && !errors.Is(err, aegis.ErrClosed) {
				tb.Errorf("Lead of %s: %v", s.ID(), err)
			}
		})
	}
	tb.Cleanup(func() { cancel(); c.all.Wait() })
	return c
}

// finish ends the campaigns, and checks what was seen.
func (c *contest) finish(tb testing.TB) {
	tb.Helper()
	c.stop()
	c.all.Wait()
	checkReigns(tb, c.reigns.all())
}

// leader waits until one of the members leads that isn't among the others.
func (c *contest) leader(tb testing.TB, others ...*aegis.Service) *aegis.Service {
	tb.Helper()
	var leader *aegis.Service
	eventually(tb, "somebody leads", func() bool {
		i := slices.IndexFunc(c.members, func(s *aegis.Service) bool { return s.IsLeader() && !slices.Contains(others, s) })
		if i >= 0 {
			leader = c.members[i]
		}
		return i >= 0
	})
	return leader
}

// brisk is a policy for tests in which time matters less than how it goes on a busy machine.
var brisk = aegis.FailoverPolicy{Lease: 1500 * time.Millisecond, Valid: time.Second, Renew: 200 * time.Millisecond, Timeout: 200 * time.Millisecond}

func TestExclusive(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var instances []*aegis.Service
	var ran journal[string] // who ran what
	add := func() *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithFailover(brisk))
		handle(t, s, "who", func(ctx context.Context, _ int) (string, error) {
			if aegis.Term(ctx) == 0 || !s.IsLeader() {
				t.Error("it runs without leading")
			}
			return s.ID(), nil
		}, aegis.Exclusive())
		handle(t, s, "any", func(ctx context.Context, _ int) (uint64, error) { return aegis.Term(ctx), nil })
		subscribe(t, s, "order.*", func(_ context.Context, e aegis.Event[int]) error {
			ran.add(fmt.Sprint("event ", e.Data, " ", e.Attempt, " ", s.ID()))
			return nil
		}, aegis.Exclusive(), aegis.Attempts(1))
		handleCommand(t, s, "work", func(_ context.Context, c *aegis.Command[int]) (string, error) { return s.ID(), nil }, aegis.Exclusive())
		start(t, s)
		instances = append(instances, s)
		return s
	}
	first := add()
	_, err := call[int, string](client, "risk", "who", 1)
	if e := fails(t, err, aegis.ErrNotActive, "risk"); !e.NotRun {
		t.Error("it may have run?")
	}
	_, err = first.Leader(t.Context())
	fails(t, err, aegis.ErrNotFound, "risk")
	add()
	add()
	for round := range 3 {
		var leader *aegis.Service
		eventually(t, "one leads", func() bool {
			id, err := client.Discover(t.Context(), "risk")
			if err != nil {
				t.Fatal(err)
			}
			states := map[string]int{}
			for _, i := range id {
				states[i.Status]++
			}
			if states["ACTIVE"] != 1 || states["STANDBY"] != 2-round || len(id) != 3-round {
				return false
			}
			i := slices.IndexFunc(instances, (*aegis.Service).IsLeader)
			if i >= 0 {
				leader = instances[i]
			}
			return i >= 0
		})
		for range 20 {
			for _, opts := range [][]aegis.CallOption{nil, {aegis.Sticky()}, {aegis.Balance(aegis.RoundRobin)}} {
				if who, err := call[int, string](client, "risk", "who", 1, opts...); who != leader.ID() || err != nil {
					t.Errorf("got %s, %v; %s leads", who, err, leader.ID())
				}
			}
			if term, err := call[int, uint64](client, "risk", "any", 1); term != 0 || err != nil {
				t.Error(term, err)
			}
		}
		for _, s := range instances {
			if id, err := s.Leader(t.Context()); id != leader.ID() || err != nil {
				t.Errorf("%s says that %q leads: %v", s.ID(), id, err)
			}
			who, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance(s.ID()))
			if s == leader {
				if who != s.ID() || err != nil {
					t.Error(who, err)
				}
			} else if e := fails(t, err, aegis.ErrNotActive, leader.ID()); e.Details["leader"] != leader.ID() || !e.NotRun {
				t.Errorf("got %+v", e)
			}
		}
		n := len(ran.all())
		for i := range 20 {
			publish(t, client, "order", "created", i)
		}
		for _, got := range ran.wait(t, n+20)[n:] {
			if !strings.HasSuffix(got, " 1 "+leader.ID()) {
				t.Errorf("got %q, but %s leads", got, leader.ID())
			}
		}
		for range 5 {
			if who := wait(t, send[int, string](t, client, "risk", "work", 1)); who != leader.ID() {
				t.Errorf("%s worked, but %s leads", who, leader.ID())
			}
		}
		if round < 2 {
			if err := leader.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			instances = slices.DeleteFunc(instances, func(s *aegis.Service) bool { return s == leader })
		}
	}
}

// A graceful stop of the leader under load: no caller that is Sticky sees an error, no call runs twice, and it is quick.
func TestHandOver(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var ran, failures atomic.Int64
	add := func() *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithFailover(brisk))
		handle(t, s, "m", func(ctx context.Context, v string) (string, error) { ran.Add(1); return v, nil }, aegis.Exclusive())
		start(t, s)
		return s
	}
	leader := add()
	eventually(t, "it leads", leader.IsLeader)
	stop := hammer(t, client, 8, "risk", "m", func(err error) { failures.Add(1); t.Error(err) }, aegis.Sticky())
	for range 10 {
		next := add()
		n := ran.Load()
		eventually(t, "calls are made", func() bool { return ran.Load() > n+100 })
		if err := leader.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next one leads", next.IsLeader)
		leader = next
	}
	if calls := stop(); calls != ran.Load() {
		t.Errorf("%d calls were answered, %d ran, %d failed", calls, ran.Load(), failures.Load())
	}
}

// A handler that ignores that Stop's time is up keeps the leadership from others until it ends, or the lease does.
func TestStopWithAStubbornExclusiveHandler(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var now atomic.Int32
	runs := make(chan string, 10)
	add := func() *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithFailover(brisk))
		handle(t, s, "m", func(context.Context, int) (int, error) {
			if now.Add(1) > 1 {
				t.Error("two run")
			}
			defer now.Add(-1)
			runs <- s.ID()
			time.Sleep(500 * time.Millisecond)
			return 1, nil
		}, aegis.Exclusive())
		start(t, s)
		return s
	}
	leader := add()
	eventually(t, "it leads", leader.IsLeader)
	next := add()
	eventually(t, "it is known", func() bool { id, err := next.Leader(t.Context()); return id == leader.ID() && err == nil })
	go func() { _, _ = call[int, int](client, "risk", "m", 1) }()
	<-runs
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, leader.Stop(ctx), aegis.ErrTimeout, "1 handlers")
	if next.IsLeader() {
		t.Error("the next one leads already")
	}
	if _, err := call[int, int](client, "risk", "m", 1, aegis.Sticky()); err != nil {
		t.Error(err)
	}
	if id := <-runs; id != next.ID() {
		t.Errorf("%s ran it", id)
	}
}

// A leader goes on though one of its connections hangs.
func TestLeaderWithAStalledConnection(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	seed := newService(t, srv, "risk") // lest the test waits for a lease
	if err := seed.Lead(t.Context(), "default", brisk, func(context.Context, uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := compete(t, aegis.Balanced, newService(t, srv, "risk", aegis.WithURL("nats://"+p.address)))
	c.leader(t)
	p.freeze()
	for end := time.Now().Add(3 * aegis.Balanced.Lease); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !c.members[0].IsLeader() {
			t.Fatal("it leads no more")
		}
	}
	if c.finish(t); c.elected.Load() != 1 {
		t.Errorf("%d terms", c.elected.Load())
	}
}

// Losing the leadership in the middle: the answer is FENCED, events and commands are handled by the next leader.
func TestFenced(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var terms journal[uint64]
	s := newService(t, srv, "risk", aegis.WithFailover(brisk))
	var lose atomic.Bool
	lose.Store(true)
	held := func(ctx context.Context) error {
		terms.add(aegis.Term(ctx))
		if lose.Load() {
			<-ctx.Done()
		}
		return nil // though it was told to end
	}
	handle(t, s, "m", func(ctx context.Context, _ int) (int, error) { return 1, held(ctx) }, aegis.Exclusive())
	subscribe(t, s, "order.*", func(ctx context.Context, e aegis.Event[int]) error { return held(ctx) }, aegis.Exclusive(), aegis.Attempts(1))
	handleCommand(t, s, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) { return c.Attempt, held(ctx) }, aegis.Exclusive(), aegis.Attempts(1))
	start(t, s)
	eventually(t, "it leads", s.IsLeader)
	publish(t, client, "order", "created", 1)
	j := send[int, int](t, client, "risk", "work", 1)
	answer := make(chan error, 1)
	go func() {
		_, err := call[int, int](client, "risk", "m", 1, aegis.Sticky(), aegis.Retry(aegis.RetryPolicy{}))
		answer <- err
	}()
	before := terms.wait(t, 3)
	kv, err := manage(t, srv).KeyValue(t.Context(), "aegis_leaders")
	if err != nil {
		t.Fatal(err)
	}
	if err := kv.Purge(t.Context(), "risk.default"); err != nil {
		t.Fatal(err)
	}
	if e := fails(t, <-answer, aegis.ErrFenced, "leadership"); e.NotRun || e.Source != "risk" {
		t.Errorf("got %+v", e)
	}
	if s.IsLeader() {
		t.Error("it still leads")
	}
	_, err = call[int, int](client, "risk", "m", 1, aegis.ToInstance(s.ID()))
	fails(t, err, aegis.ErrNotActive)
	lose.Store(false)
	if r := wait(t, j); r != 1 {
		t.Errorf("attempt %d", r)
	}
	for _, term := range terms.wait(t, 5)[3:] {
		if term <= before[0] {
			t.Errorf("term %d after %d", term, before[0])
		}
	}
	if letters := deadLetters(t, s); len(letters) > 0 {
		t.Errorf("dead letters %+v", letters)
	}
}

func TestLead(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	a, b := newService(t, srv, "risk"), newService(t, srv, "risk")
	never := func(context.Context, uint64) error { t.Error("it leads"); return nil }
	fails(t, a.Lead(t.Context(), "no group", brisk, never), aegis.ErrInvalid, "no group")
	fails(t, a.Lead(t.Context(), "g", aegis.FailoverPolicy{}, never), aegis.ErrInvalid, "Lease")
	fails(t, a.Lead(t.Context(), "g", brisk, nil), aegis.ErrInvalid, "nil")
	tooLong := brisk
	tooLong.Lease = 25 * time.Hour // others would take the key for nonsense
	fails(t, a.Lead(t.Context(), "g", tooLong, never), aegis.ErrInvalid, "24h")
	exclusive := newService(t, srv, "risk")
	handle(t, exclusive, "m", echo, aegis.Exclusive())
	fails(t, exclusive.Lead(t.Context(), "default", brisk, never), aegis.ErrInvalid, "exclusive")
	_, err := aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithFailover(aegis.FailoverPolicy{Lease: 1, Valid: 2, Renew: 1, Timeout: 1}))
	fails(t, err, aegis.ErrInvalid, "WithFailover")
	promptly(t, func() {
		fails(t, newService(t, startServer(t), "risk").Lead(t.Context(), "g", brisk, never), aegis.ErrUnavailable, "JetStream")
	})

	// Several groups at once, each with a leader of its own.
	var leads sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for _, group := range []string{"scheduler", "reaper"} {
		var now, calls atomic.Int32
		for _, s := range []*aegis.Service{a, b} {
			leads.Go(func() {
				err := s.Lead(ctx, group, brisk, func(ctx context.Context, term uint64) error {
					if now.Add(1) > 1 || term == 0 {
						t.Errorf("%d lead %s", now.Load(), group)
					}
					defer now.Add(-1)
					calls.Add(1)
					<-ctx.Done()
					return errors.New("not this one")
				})
				if !errors.Is(err, aegis.ErrCanceled) || !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
			})
		}
		eventually(t, group+" is led", func() bool { return calls.Load() > 0 })
	}
	if a.IsLeader() || b.IsLeader() {
		t.Error("that is another group")
	}
	cancel()
	leads.Wait()

	// What fn returns while it leads is what Lead returns, and the next one has it at once.
	mine := errors.New("mine")
	if err := a.Lead(t.Context(), "g", brisk, func(context.Context, uint64) error { return mine }); err != mine {
		t.Errorf("got %v", err)
	}
	begin := time.Now()
	if err := b.Lead(t.Context(), "g", aegis.Conservative, func(context.Context, uint64) error { return nil }); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > aegis.Conservative.Lease/2 {
		t.Errorf("a lease that was released was taken after %v", took)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, b.Lead(ctx, "another", brisk, never), aegis.ErrTimeout)

	// Stop ends it, and waits for fn.
	leading, result := make(chan struct{}), make(chan error, 1)
	var ended atomic.Bool
	go func() {
		result <- a.Lead(t.Context(), "g", brisk, func(ctx context.Context, _ uint64) error {
			close(leading)
			<-ctx.Done()
			time.Sleep(20 * time.Millisecond)
			ended.Store(true)
			return nil
		})
	}()
	<-leading
	if err := a.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !ended.Load() {
		t.Error("Stop did not wait")
	}
	fails(t, <-result, aegis.ErrClosed, "risk")
	fails(t, a.Lead(t.Context(), "g", brisk, never), aegis.ErrClosed)
	begin = time.Now()
	if err := b.Lead(t.Context(), "g", aegis.Conservative, func(context.Context, uint64) error { return nil }); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > aegis.Conservative.Lease/2 {
		t.Errorf("the next one had to wait for %v", took)
	}
}

// A leader that is cut off, either way or both, stops to lead before the next one begins. Once healed there is still one.
func TestPartition(t *testing.T) {
	t.Parallel()
	for name, ways := range map[string][]way{"to server": {toServer}, "to client": {toClient}, "both": {toServer, toClient}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			proxies := map[*aegis.Service]*proxy{}
			var members []*aegis.Service
			for range 3 {
				p := startProxy(t, srv)
				s := newService(t, srv, "risk", aegis.WithURL("nats://"+p.address))
				proxies[s] = p
				members = append(members, s)
			}
			c := compete(t, brisk, members...)
			last := c.leader(t)
			for range 2 {
				proxies[last].hold(ways...)
				next := c.leader(t, last)
				if last.IsLeader() {
					t.Error("two lead")
				}
				proxies[last].heal()
				time.Sleep(brisk.Lease / 4) // for what was held up to do its harm
				last = next
			}
			eventually(t, "a second term begins", func() bool { return c.elected.Load() >= 2 })
			c.finish(t)
		})
	}
}

// A renewal whose confirmation is lost was made all the same: the leader finds out, and goes on in the same term.
func TestLostConfirmationOfRenewal(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	s := newService(t, srv, "risk", aegis.WithURL("nats://"+p.address), reconnect)
	patient := aegis.FailoverPolicy{Lease: 15 * time.Second, Valid: 12 * time.Second, Renew: 100 * time.Millisecond, Timeout: 200 * time.Millisecond}
	seed := newService(t, srv, "risk") // lest the test waits for a lease
	if err := seed.Lead(t.Context(), "default", brisk, func(context.Context, uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := compete(t, patient, s)
	c.leader(t)
	kv, err := manage(t, srv).KeyValue(t.Context(), "aegis_leaders")
	if err != nil {
		t.Fatal(err)
	}
	revision := func() uint64 {
		e, err := kv.Get(t.Context(), "risk.default")
		if err != nil {
			t.Fatal(err)
		}
		return e.Revision()
	}
	for range 3 {
		was := revision()
		p.hold(toClient)
		for end := time.Now().Add(time.Second); revision() == was && time.Now().Before(end); { // else it was the one before that
			time.Sleep(time.Millisecond)
		}
		time.Sleep(patient.Timeout) // until it is given up
		p.cut()
		p.heal()
		was = revision()
		eventually(t, "renewals go on", func() bool { return revision() > was+1 })
	}
	if !s.IsLeader() {
		t.Error("it leads no more")
	}
	if c.finish(t); c.elected.Load() != 1 {
		t.Errorf("%d terms", c.elected.Load())
	}
}

// Whatever becomes of the key, there is one leader at a time, and terms rise.
func TestLeadersKeyIsLost(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]func(t *testing.T, js jetstream.JetStream){
		"purged":  func(t *testing.T, js jetstream.JetStream) { purgeLeader(t, js, jetstream.KeyValue.Purge) },
		"deleted": func(t *testing.T, js jetstream.JetStream) { purgeLeader(t, js, jetstream.KeyValue.Delete) },
		"bucket deleted": func(t *testing.T, js jetstream.JetStream) {
			if err := js.DeleteKeyValue(t.Context(), "aegis_leaders"); err != nil {
				t.Fatal(err)
			}
		},
		"garbage": func(t *testing.T, js jetstream.JetStream) {
			kv, err := js.KeyValue(t.Context(), "aegis_leaders")
			if err == nil {
				_, err = kv.Put(t.Context(), "risk.default", []byte(`{"term":18446744073709551615,"nonce":"x","lease":-5}`))
			}
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			c := compete(t, brisk, newService(t, srv, "risk"), newService(t, srv, "risk"), newService(t, srv, "risk"))
			for range 2 {
				leader := c.leader(t)
				n := len(c.reigns.all())
				harm(t, manage(t, srv))
				eventually(t, "it leads no more", func() bool { return !leader.IsLeader() || len(c.reigns.all()) > n })
				c.leader(t)
			}
			eventually(t, "a third term begins", func() bool { return c.elected.Load() >= 3 })
			c.finish(t)
		})
	}
}

func purgeLeader(t *testing.T, js jetstream.JetStream, how func(jetstream.KeyValue, context.Context, string, ...jetstream.KVDeleteOpt) error) {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), "aegis_leaders")
	if err == nil {
		err = how(kv, t.Context(), "risk.default")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestElectionThroughServerRestart(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	c := compete(t, brisk, newService(t, srv, "risk", reconnect), newService(t, srv, "risk", reconnect), newService(t, srv, "risk", reconnect))
	samePort := onPort(srv)
	for range 2 {
		c.leader(t)
		srv.Shutdown()
		srv.WaitForShutdown()
		eventually(t, "nobody leads", func() bool { return !slices.ContainsFunc(c.members, (*aegis.Service).IsLeader) })
		srv = startServer(t, samePort, store)
		c.leader(t)
	}
	eventually(t, "a third term begins", func() bool { return c.elected.Load() >= 3 })
	c.finish(t)
}

func TestElectionInACluster(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.ClientURL())
	}
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	var members []*aegis.Service
	for range 3 {
		members = append(members, newService(t, servers[0], "risk", aegis.WithURL(urls...), aegis.WithReplicas(3), reconnect))
	}
	c := compete(t, aegis.Balanced, members...)
	c.leader(t)
	leads := func(s *server.Server) bool { return s.Running() && s.JetStreamIsStreamLeader("$G", "KV_aegis_leaders") }
	eventually(t, "the bucket has a leader", func() bool { return slices.ContainsFunc(servers, leads) })

	// A follower: nothing changes.
	before := len(c.reigns.all())
	follower := slices.IndexFunc(servers, func(s *server.Server) bool { return !leads(s) })
	servers[follower].Shutdown()
	for end := time.Now().Add(2 * aegis.Balanced.Lease); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if n := slices.IndexFunc(members, (*aegis.Service).IsLeader); n < 0 {
			t.Fatal("nobody leads since a follower is away")
		}
	}
	if n := len(c.reigns.all()); n != before {
		t.Errorf("%d reigns ended with a follower", n-before)
	}

	// The other follower, too: there is no quorum, and nobody leads.
	leader := slices.IndexFunc(servers, leads)
	other := 3 - follower - leader
	servers[other].Shutdown()
	eventually(t, "nobody leads without a quorum", func() bool { return !slices.ContainsFunc(members, (*aegis.Service).IsLeader) })
	for end := time.Now().Add(2 * aegis.Balanced.Lease); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if slices.ContainsFunc(members, (*aegis.Service).IsLeader) {
			t.Fatal("somebody leads without a quorum")
		}
	}
	c.finish(t)
}

// Losing the server that leads the bucket: nobody leads until the cluster has another, then one.
func TestElectionWithoutTheStreamLeader(t *testing.T) {
	t.Parallel()
	servers := startCluster(t, 3)
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.ClientURL())
	}
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	c := compete(t, aegis.Balanced, newService(t, servers[0], "risk", aegis.WithURL(urls...), aegis.WithReplicas(3), reconnect),
		newService(t, servers[0], "risk", aegis.WithURL(urls...), aegis.WithReplicas(3), reconnect))
	c.leader(t)
	leads := func(s *server.Server) bool { return s.Running() && s.JetStreamIsStreamLeader("$G", "KV_aegis_leaders") }
	i := -1
	eventually(t, "the bucket has a leader", func() bool { i = slices.IndexFunc(servers, leads); return i >= 0 })
	n := len(c.reigns.all())
	servers[i].Shutdown()
	servers[i].WaitForShutdown()
	eventually(t, "the cluster has another leader", func() bool { return slices.ContainsFunc(servers, leads) })
	c.leader(t)
	if got := len(c.reigns.all()) - n; got > 1 {
		t.Errorf("%d reigns ended", got)
	}
	c.finish(t)
}

// startLeader runs a child that campaigns with a policy, and collects what it says of its reigns.
func startLeader(tb testing.TB, srv *server.Server, policy string, reigns *journal[reignOf]) *process {
	tb.Helper()
	p := startProcess(tb, "leader", srv, "AEGIS_TEST_POLICY="+policy)
	ready := make(chan struct{})
	told := make(chan string, 1000)
	go func() {
		defer close(told)
		for line := range p.lines {
			r := reignOf{who: strconv.Itoa(p.Process.Pid)}
			switch n, _ := fmt.Sscan(strings.TrimPrefix(line, "reign "), &r.from, &r.to); {
			case line == "ready":
				close(ready)
			case n == 2:
				reigns.add(r)
			default:
				told <- line
			}
		}
	}()
	p.told = told
	select {
	case <-ready:
	case <-time.After(20 * time.Second):
		tb.Fatal("the child isn't ready")
	}
	return p
}

// The time from a leader's kill -9 to the first answer of the next one, as a caller sees it who is Sticky and Idempotent, and who sees
// no error. Callers who are only Sticky lose nothing but the calls that may have run.
func TestFailover(t *testing.T) { // not beside others, since it measures
	for policy, want := range map[string]struct {
		kills, all int
		from, to   time.Duration
	}{
		"Aggressive":   {4, 20, 0, 2 * time.Second},
		"Balanced":     {1, 20, 2 * time.Second, 5 * time.Second},
		"Conservative": {1, 20, 5 * time.Second, 10 * time.Second},
	} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			client := newService(t, srv, "shop")
			var reigns journal[reignOf]
			children := map[string]*process{}
			ask := func(opts ...aegis.CallOption) (term uint64, id string, err error) {
				ctx, cancel := context.WithTimeout(t.Context(), want.to+2*time.Second)
				defer cancel()
				answer, err := aegis.Call[int, string](ctx, client, "risk", "who", 1, opts...)
				if err == nil {
					_, err = fmt.Sscan(answer, &term, &id)
				}
				return term, id, err
			}
			pid := func(id string) string { return id[strings.LastIndex(id, "-")+1:] }
			add := func() {
				p := startLeader(t, srv, policy, &reigns)
				children[strconv.Itoa(p.Process.Pid)] = p
			}
			add()
			add()
			kills := want.kills
			if *full {
				kills = want.all
			}
			var took []time.Duration
			var lost atomic.Int32 // calls that may have run
			var answered [4]atomic.Int32
			done := make(chan struct{})
			var others sync.WaitGroup
			for i := range 4 { // half of them are only Sticky
				others.Go(func() {
					opts := []aegis.CallOption{aegis.Sticky(), aegis.Idempotent()}[:1+i%2]
					for {
						select {
						case <-done:
							return
						default:
						}
						if _, _, err := ask(opts...); err != nil {
							var e *aegis.Error
							if i%2 == 1 || !errors.As(err, &e) || e.NotRun {
								t.Errorf("%d options: %v", len(opts), err)
							}
							lost.Add(1)
						} else {
							answered[i].Add(1)
						}
					}
				})
			}
			term, id, err := ask(aegis.Sticky(), aegis.Idempotent())
			for range kills {
				if err != nil {
					t.Fatal(err)
				}
				for i := range answered { // lest one waits for the second leader in a row
					n := answered[i].Load()
					eventually(t, "each gets an answer", func() bool { return answered[i].Load() > n })
				}
				leader := children[pid(id)]
				begin := time.Now()
				if err := leader.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				var next uint64
				next, id, err = ask(aegis.Sticky(), aegis.Idempotent())
				for err == nil && next == term { // it had answered already
					next, id, err = ask(aegis.Sticky(), aegis.Idempotent())
				}
				took = append(took, time.Since(begin))
				if next < term {
					t.Errorf("term %d after %d", next, term)
				}
				term = next
				add()
			}
			close(done)
			others.Wait()
			if n := int(lost.Load()); n > 2*kills { // two callers have one call each under way
				t.Errorf("%d calls were lost with %d leaders", n, kills)
			}
			slices.Sort(took)
			if took[0] < want.from || took[len(took)-1] > want.to {
				t.Errorf("%v: want %v to %v", took, want.from, want.to)
			}
			t.Logf("%d kills: %v to %v, median %v", len(took), took[0], took[len(took)-1], took[len(took)/2])
			for _, p := range children {
				_ = p.input.Close() // it stops, unless it was killed
				for range p.told {
				}
			}
			checkReigns(t, reigns.all())
		})
	}
}

// A leader that is paused for longer than its lease: the next one takes over; when it goes on, it answers NOT_ACTIVE, and what it
// was about to write is refused by a store that checks terms.
func TestPausedLeader(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client, store := newService(t, srv, "shop"), newService(t, srv, "store")
	var highest atomic.Uint64
	refused := errors.New("stale term")
	handle(t, store, "write", func(_ context.Context, term uint64) (string, error) {
		for {
			was := highest.Load()
			if term < was {
				return "", refused
			}
			if highest.CompareAndSwap(was, term) {
				return "written", nil
			}
		}
	})
	start(t, store)
	var reigns journal[reignOf]
	a, b := startLeader(t, srv, "Aggressive", &reigns), startLeader(t, srv, "Aggressive", &reigns)
	who := func() (term uint64, id string) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		answer, err := aegis.Call[int, string](ctx, client, "risk", "who", 1, aegis.Sticky(), aegis.Idempotent())
		if err == nil {
			_, err = fmt.Sscan(answer, &term, &id)
		}
		if err != nil {
			t.Fatal(err)
		}
		return term, id
	}
	for range 3 {
		term, id := who()
		leader := a
		if !strings.HasSuffix(id, "-"+strconv.Itoa(a.Process.Pid)) {
			leader = b
		}
		writing := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err := aegis.Call[int, string](ctx, client, "risk", "write", 1, aegis.Sticky())
			writing <- err
		}()
		if line := <-leader.told; line != "writing" {
			t.Fatal(line)
		}
		if err := leader.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		next, other := who()
		for next == term { // it answered before it stopped
			next, other = who()
		}
		if next < term || other == id {
			t.Errorf("term %d of %s after %d of %s", next, other, term, id)
		}
		if _, err := call[uint64, string](client, "store", "write", next); err != nil {
			t.Error(err)
		}
		if err := leader.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it knows who leads", func() bool {
			_, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance(id))
			return fails(t, err, aegis.ErrNotActive).Details["leader"] == other
		})
		if line := <-leader.told; !strings.Contains(line, refused.Error()) {
			t.Errorf("the one that was paused says %q", line)
		}
		if e := fails(t, <-writing, aegis.ErrFenced, refused.Error()); e.NotRun {
			t.Error("it did run")
		}
	}
	for _, p := range []*process{a, b} {
		_ = p.input.Close()
		for range p.told {
		}
	}
	checkReigns(t, reigns.all())
}

// handleExclusively adds what children in the role of a leader serve: who answers in which term; and write, which is slow, and then
// writes to the store that the service "store" is.
func handleExclusively(svc *aegis.Service) error {
	err := aegis.Handle(svc, "who", func(ctx context.Context, _ int) (string, error) {
		return fmt.Sprint(aegis.Term(ctx), " ", svc.ID()), nil
	}, aegis.Exclusive())
	if err != nil {
		return err
	}
	return aegis.Handle(svc, "write", func(ctx context.Context, _ int) (string, error) {
		fmt.Println("writing")
		<-ctx.Done()
		_, err := aegis.Call[uint64, string](context.Background(), svc, "store", "write", aegis.Term(ctx))
		fmt.Println("store:", err)
		return "", err
	}, aegis.Exclusive())
}

// Registry.

// instances is what s discovers, as id and status.
func instances(tb testing.TB, s *aegis.Service, service string) (all []string) {
	tb.Helper()
	list, err := s.Discover(context.Background(), service)
	if err != nil {
		tb.Fatal(err)
	}
	for _, i := range list {
		all = append(all, i.ID+" "+i.Status)
	}
	return all
}

func TestDiscover(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var announced journal[string]
	if _, err := nc.Subscribe("service.risk.*", func(m *nats.Msg) {
		var i aegis.Instance
		if m.Subject != "service.risk.unregister" {
			if err := json.Unmarshal(m.Data, &i); err != nil || i.Service != "risk" {
				t.Errorf("%s: %q", m.Subject, m.Data)
			}
		}
		announced.add(strings.TrimPrefix(m.Subject, "service.risk.") + " " + i.ID)
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	client := newService(t, srv, "shop")
	if list, err := client.Discover(t.Context(), "risk"); list == nil || len(list) != 0 || err != nil {
		t.Errorf("got %v, %v", list, err)
	}
	_, err = client.Discover(t.Context(), "no service")
	fails(t, err, aegis.ErrInvalid, "no service")
	promptly(t, func() {
		_, err = newService(t, startServer(t), "shop").Discover(t.Context(), "risk")
		fails(t, err, aegis.ErrUnavailable, "JetStream")
	})
	_, err = aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithHeartbeat(time.Millisecond))
	fails(t, err, aegis.ErrInvalid, "WithHeartbeat(1ms)")

	var seen journal[string]
	watching := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer close(watching)
		for list, err := range client.Watch(ctx, "risk") {
			if err != nil {
				t.Error(err)
			}
			var ids []string
			for _, i := range list {
				ids = append(ids, i.ID+" "+i.Status+" "+strconv.Itoa(len(i.Endpoints)))
			}
			seen.add(strings.Join(ids, ", "))
		}
	}()
	seen.wait(t, 1)
	before := time.Now().Add(-time.Second)
	a := newService(t, srv, "risk", aegis.WithID("a"), aegis.WithVersion("1.2.3"), aegis.WithMetadata(map[string]string{"zone": "z1"}), aegis.WithHeartbeat(time.Second))
	handle(t, a, "m", echo)
	subscribe(t, a, "order.*", func(context.Context, aegis.Event[int]) error { return nil })
	handleCommand(t, a, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil }, aegis.Exclusive())
	start(t, a)
	seen.wait(t, 2)
	list, err := client.Discover(t.Context(), "risk")
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	got := list[0]
	want := []aegis.Endpoint{{"command", "work", "commands.risk.work", true}, {"event", "order.*", "events.order.*", false}, {"rpc", "m", "rpc.risk.m", false}}
	if got.Service != "risk" || got.ID != "a" || got.Version != "1.2.3" || got.Metadata["zone"] != "z1" || !slices.Equal(got.Endpoints, want) ||
		got.Started.Before(before) || got.Seen.Before(got.Started) || got.Status != "STANDBY" {
		t.Errorf("got %+v", got)
	}
	handle(t, a, "later", echo)
	eventually(t, "the new method shows", func() bool { return strings.HasSuffix(seen.all()[len(seen.all())-1], " 4") })
	b := newService(t, srv, "risk", aegis.WithID("b"), aegis.WithHeartbeat(time.Second))
	start(t, b)
	eventually(t, "both show", func() bool { return len(instances(t, client, "risk")) == 2 })
	eventually(t, "a leads", func() bool { return seen.all()[len(seen.all())-1] == "a ACTIVE 4, b ACTIVE 0" })
	heartbeats := func() (n int) {
		for _, line := range announced.all() {
			if line == "heartbeat b" {
				n++
			}
		}
		return n
	}
	n := len(seen.all())
	eventually(t, "b's heart beats", func() bool { return heartbeats() >= 2 })
	if all := seen.all(); len(all) != n {
		t.Errorf("Watch yields at heartbeats: %q", all)
	}
	entry := func() aegis.Instance { list, _ := client.Discover(t.Context(), "risk"); return list[len(list)-1] }
	first := entry()
	eventually(t, "it is seen again", func() bool { return entry().Seen.After(first.Seen) })
	if err := b.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, "it is gone", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	if took := time.Since(begin); took > 500*time.Millisecond {
		t.Errorf("it was gone %v after it stopped", took)
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are gone", func() bool { return len(instances(t, client, "risk")) == 0 })
	cancel()
	<-watching
	eventually(t, "all was announced", func() bool {
		all := announced.all()
		n := 0
		for _, line := range all {
			if line == "unregister " {
				n++
			}
		}
		return slices.Contains(all, "register a") && slices.Contains(all, "register b") && n == 2
	})
	if err := client.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, service := range []string{"risk", "another"} {
		_, err = client.Discover(t.Context(), service)
		fails(t, err, aegis.ErrClosed)
	}
}

func TestCrashedInstanceExpires(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var reigns journal[reignOf]
	p := startLeader(t, srv, "Aggressive", &reigns) // its heart beats each second
	eventually(t, "it shows", func() bool { return len(instances(t, client, "risk")) == 1 })
	time.Sleep(1500 * time.Millisecond) // so that its entry has been refreshed
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, "it is gone", func() bool { return len(instances(t, client, "risk")) == 0 })
	if took := time.Since(begin); took < 1500*time.Millisecond || took > 4*time.Second {
		t.Errorf("it was gone after %v, want 2 to 4 s", took)
	}
}

// Whoever was cut off for longer than entries live keeps what it knew, and shows the truth within a second when it is back.
func TestDiscoverAfterBeingCutOff(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	reconnected := make(chan struct{}, 10)
	client := newService(t, srv, "shop", aegis.WithURL("nats://"+p.address), aegis.WithPool(1), aegis.WithNATS(
		nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }),
		nats.ReconnectHandler(func(*nats.Conn) { reconnected <- struct{}{} }),
	))
	add := func(id string) *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithHeartbeat(time.Second))
		start(t, s)
		return s
	}
	add("a")
	var reigns journal[reignOf]
	crashing := startLeader(t, srv, "Aggressive", &reigns)
	stopping := add("c")
	eventually(t, "all show", func() bool { return len(instances(t, client, "risk")) == 3 })
	p.hold(toServer, toClient)
	p.cut()
	if err := crashing.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := stopping.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	add("d")
	other := newService(t, srv, "ops")
	eventually(t, "the crashed one has expired", func() bool { return len(instances(t, other, "risk")) == 2 })
	eventually(t, "the server has given the client's watch up", func() bool {
		st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_registry")
		return err == nil && st.CachedInfo().State.Consumers == 1 // the other's
	})
	if got := instances(t, client, "risk"); len(got) != 3 {
		t.Errorf("while cut off: %q", got)
	}
	p.heal()
	<-reconnected
	begin := time.Now()
	eventually(t, "it shows the truth", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "d ACTIVE"}) })
	if took := time.Since(begin); took > time.Second {
		t.Errorf("it took %v", took)
	}
}

// A call in vain of a service that isn't there leaves nothing behind, neither here nor in the server.
func TestCallsInVain(t *testing.T) { // not beside others, since it counts goroutines
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	handle(t, svc, "m", echo)
	start(t, svc)
	client := newService(t, srv, "shop")
	_, err := call[string, string](client, "nobody", "m", "")
	fails(t, err, aegis.ErrUnavailable)
	before := runtime.NumGoroutine()
	for i := range 100 {
		_, err := call[string, string](client, fmt.Sprint("nobody", i), "m", "")
		fails(t, err, aegis.ErrUnavailable, "is not running")
		_, err = call[string, string](client, "risk", "nothing", "")
		fails(t, err, aegis.ErrUnimplemented)
	}
	if n := runtime.NumGoroutine() - before; n > 20 {
		t.Errorf("%d goroutines are left", n)
	}
	st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_registry")
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().State.Consumers; n > 1 { // of risk's entries
		t.Errorf("%d consumers are left", n)
	}
}

// What is denied isn't tried again and again, since each denial is logged, here and by the server.
func TestDenialsAreFew(t *testing.T) {
	t.Parallel()
	publish, subscribe := allowances(t, "it sends commands")
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: &server.Permissions{
			Publish:   &server.SubjectPermission{Allow: append(publish, "rpc.>")},
			Subscribe: &server.SubjectPermission{Allow: subscribe},
		}}}
	})
	svc := newService(t, srv, "orders", aegis.WithNATS(nats.UserInfo("admin", "")))
	handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
	start(t, svc)
	var logged safeBuffer
	shop := newService(t, srv, "shop", aegis.WithNATS(nats.UserInfo("user", "")), aegis.WithLogger(slog.New(slog.NewTextHandler(&logged, nil))))
	denials := func() int { return strings.Count(logged.String(), "ermissions") }
	for range 100 {
		if _, err := aegis.SendCommand[int, int](t.Context(), shop, "orders", "work", 1); err != nil {
			t.Fatal(err)
		}
		_, err := call[int, int](shop, "orders", "missing", 1)
		fails(t, err, aegis.ErrUnavailable, "$SRV.INFO.orders")
	}
	if n := denials(); n > 2 { // one a connection
		t.Errorf("%d denials of 200 questions", n)
	}
	_, err := shop.Discover(t.Context(), "orders")
	fails(t, err, aegis.ErrDenied)
	before := denials()
	time.Sleep(8 * time.Second)
	if n := denials() - before; n > 15 {
		t.Errorf("%d denials in 8 s", n)
	}
}

// A JetStream that doesn't answer makes Discover wait, until its ctx ends.
func TestDiscoverWithoutAnswer(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := nc.Subscribe("$JS.API.>", func(*nats.Msg) {}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err = newService(t, srv, "shop").Discover(ctx, "risk")
	fails(t, err, aegis.ErrTimeout)
	if ctx.Err() == nil {
		t.Error("it did not wait")
	}
}

func TestThousandInstances(t *testing.T) { // not beside others, since it takes the whole machine
	const n = 1000
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	if got := instances(t, client, "risk"); len(got) != 0 {
		t.Fatal(got)
	}
	var all [n]*aegis.Service
	var starting sync.WaitGroup
	for p := range 8 {
		starting.Go(func() {
			for i := p; i < n; i += 8 {
				all[i] = newService(t, srv, "risk", aegis.WithPool(1))
				handle(t, all[i], "who", func(context.Context, int) (string, error) { return all[i].ID(), nil })
				start(t, all[i])
			}
		})
	}
	starting.Wait()
	eventually(t, "all show", func() bool { return len(instances(t, client, "risk")) == n })
	answered := map[string]bool{}
	for range n {
		who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.RoundRobin))
		if err != nil {
			t.Fatal(err)
		}
		answered[who] = true
	}
	if len(answered) < n*9/10 { // heartbeats make the list anew, in the same order
		t.Errorf("%d instances were called in turn", len(answered))
	}
	for p := range 8 {
		starting.Go(func() {
			for i := p; i < n; i += 8 {
				if i%10 != 0 {
					if err := all[i].Stop(context.Background()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	starting.Wait()
	eventually(t, "a tenth is left", func() bool { return len(instances(t, client, "risk")) == n/10 })
}

func TestMalformedEntries(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var logged safeBuffer
	client := newService(t, srv, "shop", aegis.WithLogger(slog.New(slog.NewTextHandler(&logged, nil))))
	svc := newService(t, srv, "risk", aegis.WithID("a"))
	handle(t, svc, "m", echo)
	start(t, svc)
	kv, err := manage(t, srv).KeyValue(t.Context(), "aegis_registry")
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"risk.x1": "garbage", "risk.x2": `{"service":"risk","id":"a"}`, "risk.x3": `[` + strings.Repeat("[", 20000), "risk.x4": `{"service":"other","id":"x4"}`,
		"risk.x5": `{"service":"risk","id":"x5","endpoints":{}}`,
	} {
		if _, err := kv.Put(t.Context(), key, []byte(value)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is logged", func() bool {
			if got := instances(t, client, "risk"); !slices.Equal(got, []string{"a ACTIVE"}) {
				t.Fatal(got)
			}
			return strings.Contains(logged.String(), "key="+key)
		})
	}
	if _, err := call[string, string](client, "risk", "m", "", aegis.Balance(aegis.Random)); err != nil {
		t.Error(err)
	}
}

// A safeBuffer may be written to by several goroutines.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestBalance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var all []*aegis.Service
	busy := make(chan struct{})
	var held [3]atomic.Int32
	for i := range 3 {
		s := newService(t, srv, "risk", aegis.WithID(strconv.Itoa(i)))
		handle(t, s, "who", func(ctx context.Context, hold bool) (string, error) {
			if hold {
				held[i].Add(1)
				<-busy
			}
			return s.ID(), nil
		})
		if i == 0 {
			handle(t, s, "only0", func(context.Context, int) (string, error) { return s.ID(), nil })
		}
		start(t, s)
		all = append(all, s)
	}
	count := func(n int, opts ...aegis.CallOption) map[string]int {
		t.Helper()
		by := map[string]int{}
		for range n {
			who, err := call[bool, string](client, "risk", "who", false, opts...)
			if err != nil {
				t.Fatal(err)
			}
			by[who]++
		}
		return by
	}
	eventually(t, "all show", func() bool { return len(instances(t, client, "risk")) == 3 })
	if by := count(30, aegis.Balance(aegis.RoundRobin)); by["0"] != 10 || by["1"] != 10 || by["2"] != 10 {
		t.Errorf("round robin: %v", by)
	}
	if by := count(300, aegis.Balance(aegis.Random)); by["0"] < 50 || by["1"] < 50 || by["2"] < 50 {
		t.Errorf("random: %v", by)
	}
	by := map[string]int{}
	for range 10 { // the turns of one method are not another's
		for range 2 {
			if who, err := call[int, string](client, "risk", "only0", 1, aegis.Balance(aegis.RoundRobin)); who != "0" || err != nil {
				t.Error(who, err)
			}
		}
		for who := range count(1, aegis.Balance(aegis.RoundRobin)) {
			by[who]++
		}
	}
	if len(by) != 3 {
		t.Errorf("in turn with calls of another method: %v", by)
	}
	_, err := call[int, string](client, "risk", "none", 1, aegis.Balance(aegis.RoundRobin))
	fails(t, err, aegis.ErrUnimplemented, "rpc.risk.none")
	_, err = call[bool, string](client, "risk", "who", false, aegis.Balance(7))
	fails(t, err, aegis.ErrInvalid, "Balance(7)")

	// Least loaded: calls that hang are spread evenly.
	var hanging sync.WaitGroup
	total := func() int32 { return held[0].Load() + held[1].Load() + held[2].Load() }
	for i := range int32(30) {
		hanging.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, _ = aegis.Call[bool, string](ctx, client, "risk", "who", true, aegis.Balance(aegis.LeastLoaded))
		})
		eventually(t, "it hangs", func() bool { return total() == i+1 })
	}
	for i := range held {
		if n := held[i].Load(); n < 7 || n > 13 {
			t.Errorf("%d calls hang on instance %d", n, i)
		}
	}
	close(busy)
	hanging.Wait()

	// One that has crashed is skipped at once, though the registry doesn't know yet.
	crashed := startProcess(t, "crashing", srv)
	if line, _ := crashed.line(t); line != "ready" {
		t.Fatal(line)
	}
	eventually(t, "it shows", func() bool { return len(instances(t, client, "risk")) == 4 })
	if err := crashed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server knows", func() bool {
		_, err := call[bool, string](client, "risk", "who", false, aegis.ToInstance("crashing"))
		return errors.Is(err, aegis.ErrUnavailable)
	})
	for _, s := range []aegis.Strategy{aegis.RoundRobin, aegis.Random, aegis.LeastLoaded} {
		for range 30 {
			promptly(t, func() { count(1, aegis.Balance(s)) })
		}
	}
	for _, s := range all {
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	_, err = call[bool, string](client, "risk", "who", false, aegis.Balance(aegis.RoundRobin))
	fails(t, err, aegis.ErrUnavailable, "risk")
}

// An unwell instance gives the leadership up, takes part in nothing that is shared, isn't chosen, and answers when it is addressed.
func TestHealth(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var sick atomic.Bool
	var panics atomic.Bool
	add := func(id string, opts ...aegis.Option) *aegis.Service {
		s := newService(t, srv, "risk", append(opts, aegis.WithID(id), aegis.WithFailover(brisk), aegis.WithHeartbeat(time.Second))...)
		handle(t, s, "who", func(context.Context, int) (string, error) { return id, nil })
		handle(t, s, "leader", func(context.Context, int) (string, error) { return id, nil }, aegis.Exclusive())
		subscribe(t, s, "order.*", func(_ context.Context, e aegis.Event[func(string)]) error { return nil })
		handleCommand(t, s, "work", func(context.Context, *aegis.Command[int]) (string, error) { return id, nil })
		start(t, s)
		return s
	}
	a := add("a", aegis.WithHealthCheck("database", func(ctx context.Context) error {
		if panics.Load() {
			panic("ouch")
		}
		if sick.Load() {
			return errors.New("no database")
		}
		return nil
	}))
	eventually(t, "a leads", a.IsLeader)
	b := add("b", aegis.WithHealthCheck("fine", func(context.Context) error { return nil }))
	eventually(t, "both show", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "b STANDBY"}) })
	for round := range 2 {
		sick.Store(round == 0)
		panics.Store(round == 1)
		eventually(t, "a is unwell, and b leads", func() bool {
			return slices.Equal(instances(t, client, "risk"), []string{"a UNHEALTHY", "b ACTIVE"}) && b.IsLeader() && !a.IsLeader()
		})
		eventually(t, "nobody but b gets calls", func() bool {
			for range 20 {
				if who, err := call[int, string](client, "risk", "who", 1); who != "b" || err != nil {
					return false
				}
			}
			return true
		})
		for range 20 {
			if who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.RoundRobin)); who != "b" || err != nil {
				t.Error(who, err)
			}
			if who, err := call[int, string](client, "risk", "leader", 1, aegis.Sticky()); who != "b" || err != nil {
				t.Error(who, err)
			}
			if who, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance("a")); who != "a" || err != nil {
				t.Error(who, err)
			}
		}
		_, err := call[int, string](client, "risk", "leader", 1, aegis.ToInstance("a"))
		fails(t, err, aegis.ErrNotActive, "b")
		eventually(t, "nobody but b gets commands, once what a has asked for is over", func() bool {
			for range 20 {
				if who := wait(t, send[int, string](t, client, "risk", "work", 1)); who != "b" {
					return false
				}
			}
			return true
		})
		sick.Store(false)
		panics.Store(false)
		eventually(t, "a is well again", func() bool {
			return slices.Equal(instances(t, client, "risk"), []string{"a STANDBY", "b ACTIVE"})
		})
		eventually(t, "a gets calls", func() bool { who, err := call[int, string](client, "risk", "who", 1); return who == "a" && err == nil })
		eventually(t, "a gets commands", func() bool { return wait(t, send[int, string](t, client, "risk", "work", 1)) == "a" })
		if round == 0 {
			if err := b.Stop(t.Context()); err != nil { // gives the leadership back
				t.Fatal(err)
			}
			eventually(t, "a leads again", a.IsLeader)
			b = add("b")
			eventually(t, "b is back", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "b STANDBY"}) })
		}
	}
	_, err := aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithHealthCheck("", nil))
	fails(t, err, aegis.ErrInvalid, "WithHealthCheck")
}

// A health check that hangs counts as failed; it holds nothing else up.
func TestHangingHealthCheck(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var hangs atomic.Bool
	release := make(chan struct{})
	s := newService(t, srv, "risk", aegis.WithID("a"), aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("hangs", func(ctx context.Context) error {
		if hangs.Load() {
			<-release // whatever ctx says
		}
		return nil
	}))
	start(t, s)
	eventually(t, "it is well", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	hangs.Store(true)
	eventually(t, "it is unwell", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a UNHEALTHY"}) })
	hangs.Store(false)
	close(release)
	eventually(t, "it is well again", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
}

func TestRegistryThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	if _, err := manage(t, srv).CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "aegis_registry"}); err != nil {
		t.Fatal(err)
	}
	svc := newService(t, srv, "risk")
	handle(t, svc, "m", echo)
	fails(t, svc.Start(t.Context()), aegis.ErrInvalid, "KV_aegis_registry", "allow_msg_ttl")
}

// Metrics, health, the subjects of NATS services.

// endpointStats are those of one endpoint, which must be there.
func endpointStats(tb testing.TB, s *aegis.Service, kind, name string) aegis.EndpointStats {
	tb.Helper()
	for _, e := range s.Stats().Endpoints {
		if e.Kind == kind && e.Name == name {
			return e
		}
	}
	tb.Fatalf("no statistics of %s %s: %+v", kind, name, s.Stats().Endpoints)
	return aegis.EndpointStats{}
}

func TestStats(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc", aegis.WithPool(3), aegis.WithVersion("1.2.3"))
	shop, web := newService(t, srv, "shop"), newService(t, srv, "web")
	handle(t, svc, "m", func(_ context.Context, what string) (string, error) {
		switch what {
		case "refuse":
			return "", &aegis.Error{Code: "NO_FUNDS"}
		case "panic":
			panic("oh")
		case "slow":
			time.Sleep(20 * time.Millisecond)
		}
		return what, nil
	})
	inside, release := make(chan struct{}, 10), make(chan struct{})
	handle(t, svc, "blocked", func(context.Context, string) (string, error) {
		inside <- struct{}{}
		<-release
		return "", nil
	}, aegis.Concurrency(1))
	if got := svc.Stats(); len(got.Endpoints) != 2 || got.Endpoints[0].Name != "blocked" || got.Endpoints[1].Requests != 0 || got.Connected != 3 {
		t.Errorf("before Start: %+v", got)
	}
	start(t, svc)
	for what, n := range map[string]int{"ok": 95, "slow": 5, "refuse": 3, "panic": 2} {
		for range n {
			if _, err := call[string, string](shop, "svc", "m", what); (err == nil) != (what == "ok" || what == "slow") {
				t.Fatal(what, err)
			}
		}
	}
	if _, err := call[int, string](web, "svc", "m", 1); err == nil {
		t.Error("a number is no string")
	}
	if _, err := call[string, string](web, "svc", "nothing", ""); err == nil {
		t.Error("there is no such method")
	}
	// What was answered was counted before.
	m := endpointStats(t, svc, "rpc", "m")
	if m.Requests != 106 || m.Errors != 6 || !reflect.DeepEqual(m.Codes, map[string]uint64{"NO_FUNDS": 3, "INTERNAL": 2, "INVALID_ARGUMENT": 1}) ||
		!reflect.DeepEqual(m.Callers, map[string]uint64{"shop": 105, "web": 1}) || m.InFlight != 0 || m.Pending != 0 || m.Shed != 0 || m.Expired != 0 {
		t.Errorf("%+v", m)
	}
	if m.P50 <= 0 || m.P50 > 15*time.Millisecond || m.P90 < m.P50 || m.P99 < 19*time.Millisecond || m.P99 > m.Max || m.Max < 20*time.Millisecond || m.Max > 5*time.Second {
		t.Errorf("latencies %v %v %v %v", m.P50, m.P90, m.P99, m.Max)
	}
	c := endpointStats(t, shop, "call", "svc.m")
	if c.Requests != 105 || c.Errors != 5 || c.Codes["NO_FUNDS"] != 3 || c.P99 < 19*time.Millisecond || c.InFlight != 0 {
		t.Errorf("%+v", c)
	}
	if c := endpointStats(t, web, "call", "svc.nothing"); c.Requests != 1 || c.Codes["UNIMPLEMENTED"] != 1 {
		t.Errorf("%+v", c)
	}

	// One runs, one waits, one is refused, and the one that waits gives up.
	first := make(chan error, 1)
	go func() { _, err := call[string, string](shop, "svc", "blocked", ""); first <- err }()
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	second := make(chan error, 1)
	go func() { _, err := aegis.Call[string, string](ctx, shop, "svc", "blocked", ""); second <- err }()
	eventually(t, "one waits", func() bool { return endpointStats(t, svc, "rpc", "blocked").Pending == 1 })
	eventually(t, "the gate is there", func() bool {
		_, err := call[string, string](shop, "svc", "blocked", "")
		return errors.Is(err, aegis.ErrOverloaded)
	})
	if b, c := endpointStats(t, svc, "rpc", "blocked"), endpointStats(t, shop, "call", "svc.blocked"); b.InFlight != 1 || b.Shed != 1 || b.Codes["OVERLOADED"] != 1 || c.InFlight != 2 {
		t.Errorf("%+v\n%+v", b, c)
	}
	fails(t, <-second, aegis.ErrTimeout)
	time.Sleep(50 * time.Millisecond) // when it arrived is known to a few milliseconds
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	eventually(t, "what has expired is dropped", func() bool { return endpointStats(t, svc, "rpc", "blocked").Expired == 1 })
	if b := endpointStats(t, svc, "rpc", "blocked"); b.Requests != 3 || b.Errors != 2 || b.InFlight != 0 || b.Pending != 0 || b.Callers["shop"] != 3 {
		t.Errorf("%+v", b)
	}

	st := svc.Stats()
	if st.Service != "svc" || st.Instance != svc.ID() || st.Version != "1.2.3" || st.Uptime <= 0 || st.Uptime > time.Minute || st.Connected != 3 || st.Reconnects != 0 || len(st.Leading) > 0 {
		t.Errorf("%+v", st)
	}
	if err := svc.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := svc.Stats(); st.Connected != 0 || len(st.Endpoints) != 2 { // what it did can still be seen
		t.Errorf("%+v", st)
	}
}

// What fails only after the handler has returned, or before it is called, counts as a failure on both sides.
func TestStatsOfLateFailures(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, shop := newService(t, srv, "svc"), newService(t, srv, "shop")
	handle(t, svc, "m", func(_ context.Context, what string) (string, error) {
		switch what {
		case "large":
			return strings.Repeat("x", 2<<20), nil
		case "no code":
			return "", &aegis.Error{Message: "no code"}
		}
		return "", &aegis.Error{Code: what, Message: strings.Repeat("<", 1<<18)}
	})
	handleCommand(t, svc, "work", func(ctx context.Context, c *aegis.Command[int]) (string, error) {
		if c.Data == 0 {
			return strings.Repeat("x", 2<<20), nil
		}
		<-ctx.Done()
		return "too late", nil
	})
	start(t, svc)
	for _, what := range []string{"large", "no code", "A\xff", "A\xfe"} {
		if _, err := call[string, string](shop, "svc", "m", what); err == nil {
			t.Error(what)
		}
	}
	want := map[string]uint64{"INTERNAL": 2, "A?": 2}
	m, c := endpointStats(t, svc, "rpc", "m"), endpointStats(t, shop, "call", "svc.m")
	if !reflect.DeepEqual(m.Codes, want) || !reflect.DeepEqual(c.Codes, want) || m.Requests != 4 || m.Errors != 4 || c.Errors != 4 {
		t.Errorf("%+v\n%+v", m, c)
	}
	handle(t, svc, "text", echo)
	if _, err := call[string, int](shop, "svc", "text", "x"); err == nil {
		t.Error("a text is no number")
	}
	if c := endpointStats(t, shop, "call", "svc.text"); c.Codes["INTERNAL"] != 1 {
		t.Errorf("%+v", c)
	}
	fails(t, waitError(t, send[int, string](t, shop, "svc", "work", 0)), aegis.ErrInternal, "max_payload")
	j := send[int, string](t, shop, "svc", "work", 1)
	eventually(t, "it runs", func() bool { return endpointStats(t, svc, "command", "work").InFlight == 1 })
	if err := j.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has ended", func() bool { return endpointStats(t, svc, "command", "work").InFlight == 0 })
	if w := endpointStats(t, svc, "command", "work"); !reflect.DeepEqual(w.Codes, map[string]uint64{"INTERNAL": 1, "CANCELED": 1}) || w.Requests != 2 || w.DeadLetters != 1 {
		t.Errorf("%+v", w)
	}
	// The large error can be told, cut.
	deps, err := shop.Dependencies(t.Context())
	if err != nil || len(deps) != 3 || deps[0].Errors != 4 {
		t.Error(deps, err)
	}
}

// Instances, callers and codes come from elsewhere, and there may be any number of them.
func TestStatsAreBounded(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", func(_ context.Context, n int) (int, error) {
		return 0, &aegis.Error{Code: fmt.Sprint("CODE_", n, strings.Repeat("x", 200))}
	})
	start(t, svc)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	inbox, err := nc.SubscribeSync("_INBOX.>")
	if err != nil {
		t.Fatal(err)
	}
	const n = 1000
	for i := range n {
		if err := nc.PublishRequest("rpc.svc.m", fmt.Sprintf("_INBOX.s%d.ABCDEFGHIJKL.1.1.5000", i), []byte(strconv.Itoa(100+i))); err != nil {
			t.Fatal(err)
		}
		if _, err := inbox.NextMsg(5 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	m := endpointStats(t, svc, "rpc", "m")
	var codes, callers uint64
	for code, n := range m.Codes {
		if codes += n; len(code) > 64 {
			t.Errorf("a code of %d bytes", len(code))
		}
	}
	for _, n := range m.Callers {
		callers += n
	}
	if len(m.Codes) > 65 || len(m.Callers) > 257 || m.Codes["OTHERS"] == 0 || m.Callers["OTHERS"] == 0 || codes != n || callers != n || m.Requests != n {
		t.Errorf("%d codes of %d, %d callers of %d, %d requests", len(m.Codes), codes, len(m.Callers), callers, m.Requests)
	}
}

func TestStatsOfEventsAndCommands(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, shop := newService(t, srv, "risk"), newService(t, srv, "shop")
	inside, release := make(chan struct{}, 100), make(chan struct{})
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
		inside <- struct{}{}
		<-release
		if e.Data == 0 && e.Attempt == 1 {
			return errors.New("not yet")
		}
		return nil
	}, aegis.Concurrency(1), aegis.Backoff(time.Millisecond, time.Millisecond))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		inside <- struct{}{}
		<-release
		return c.Data, nil
	}, aegis.Concurrency(1))
	start(t, svc)
	var jobs []*aegis.Job[int]
	for i := range 5 {
		publish(t, shop, "order", "created", i)
		jobs = append(jobs, send[int, int](t, shop, "risk", "work", i, aegis.AtPriority(aegis.Low)))
	}
	<-inside
	<-inside
	eventually(t, "four wait", func() bool {
		e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
		return e.Pending == 4 && c.Pending == 4 && e.InFlight == 1 && c.InFlight == 1
	})
	close(release)
	for _, j := range jobs {
		wait(t, j)
	}
	eventually(t, "all are handled", func() bool {
		e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
		return e.Requests == 6 && c.Requests == 5 && e.Pending == 0 && c.Pending == 0 && e.InFlight == 0
	})
	e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
	if e.Errors != 1 || e.Codes["INTERNAL"] != 1 || e.Callers["shop"] != 6 || e.Max <= 0 || c.Errors != 0 || c.Callers["shop"] != 5 {
		t.Errorf("%+v\n%+v", e, c)
	}
}

func TestStatsOfConnectionsBreakersAndLeadership(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "svc", aegis.WithFailover(aegis.Aggressive), aegis.WithBreaker(aegis.BreakerPolicy{Failures: 1, Cooldown: 200 * time.Millisecond}))
	handle(t, svc, "m", echo, aegis.Exclusive())
	start(t, svc)
	leading := make(chan uint64)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error)
	go func() {
		ended <- svc.Lead(ctx, "reaper", aegis.Aggressive, func(ctx context.Context, term uint64) error {
			leading <- term
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	term := <-leading
	eventually(t, "it leads", svc.IsLeader)
	if l := svc.Stats().Leading; len(l) != 2 || l["reaper"] != term || l["default"] == 0 {
		t.Errorf("%v, want the term %d", l, term)
	}
	cancel()
	<-ended
	if l := svc.Stats().Leading; len(l) != 1 {
		t.Error(l)
	}

	if _, err := call[string, string](svc, "svc", "m", "x"); err != nil {
		t.Fatal(err)
	}
	if b := svc.Stats().Breakers; !reflect.DeepEqual(b, map[string]string{"svc": "closed"}) {
		t.Error(b)
	}
	_, err := call[int, int](svc, "other", "m", 1)
	fails(t, err, aegis.ErrUnavailable)
	if b := svc.Stats().Breakers; !reflect.DeepEqual(b, map[string]string{"svc": "closed", "other": "open"}) {
		t.Error(b)
	}
	eventually(t, "it may be tried", func() bool { return svc.Stats().Breakers["other"] == "half-open" })

	again := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "both connections are lost", func() bool { return svc.Stats().Connected == 0 })
	startServer(t, again, withJetStream(t))
	eventually(t, "they are back", func() bool { st := svc.Stats(); return st.Connected == 2 && st.Reconnects == 2 })
}

// get asks a service's HTTP handler.
func get(tb testing.TB, s *aegis.Service, path string) (status int, body string) {
	tb.Helper()
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

// TestMetrics reads /metrics as Prometheus does. CI checks the text by Prometheus's own linter besides (see .ci/run), for which it
// is written to $AEGIS_METRICS.
func TestMetrics(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "svc", aegis.WithFailover(aegis.Aggressive), aegis.WithBreaker(aegis.BreakerPolicy{}))
	handle(t, svc, "m", func(_ context.Context, what string) (string, error) {
		if what != "" {
			return "", &aegis.Error{Code: what}
		}
		time.Sleep(2 * time.Millisecond)
		return "", nil
	})
	handle(t, svc, "alone", echo, aegis.Exclusive())
	subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error { return nil })
	start(t, svc)
	eventually(t, "it leads", svc.IsLeader)
	const odd = "a\"b\\c\nd\xff"
	for _, what := range []string{"", "", "", "NO_FUNDS", odd} {
		_, _ = call[string, string](svc, "svc", "m", what)
	}
	publish(t, svc, "order", "created", 1)
	eventually(t, "it is handled", func() bool {
		e := endpointStats(t, svc, "event", "order.*")
		return e.Requests == 1 && e.Pending == 0
	})
	status, text := get(t, svc, "/metrics")
	if status != http.StatusOK {
		t.Fatal(status)
	}
	if file := os.Getenv("AEGIS_METRICS"); file != "" {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Error(err)
		}
	}
	samples := map[string]float64{}
	kinds, described := map[string]string{}, map[string]bool{}
	family := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			name, help, _ := strings.Cut(rest, " ")
			if family = name; described[name] || help == "" {
				t.Errorf("%s is described twice, or not", name)
			}
			described[name] = true
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if kinds[name] = kind; name != family {
				t.Errorf("the type of %s is among %s", name, family)
			}
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil || !utf8.ValidString(line) || !strings.HasPrefix(line, family) || !strings.Contains(line, `{service="svc"`) {
			t.Errorf("not a sample of %s: %q", family, line)
		}
		if _, twice := samples[line[:i]]; twice {
			t.Errorf("twice: %s", line)
		}
		samples[line[:i]] = value
	}
	for name, kind := range map[string]string{
		"aegis_requests_total": "counter", "aegis_request_duration_seconds": "histogram", "aegis_in_flight": "gauge", "aegis_pending": "gauge",
		"aegis_shed_total": "counter", "aegis_expired_total": "counter", "aegis_connections": "gauge", "aegis_reconnects_total": "counter",
		"aegis_breaker_open": "gauge", "aegis_leader": "gauge", "aegis_uptime_seconds": "gauge",
	} {
		if kinds[name] != kind || !described[name] {
			t.Errorf("%s is a %q, want a %s", name, kinds[name], kind)
		}
	}
	for sample, want := range map[string]float64{
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code=""}`:                     3,
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code="NO_FUNDS"}`:             1,
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code="a\"b\\c\nd?"}`:          1,
		`aegis_requests_total{service="svc",kind="call",endpoint="svc.m",code=""}`:                3,
		`aegis_requests_total{service="svc",kind="event",endpoint="order.*",code=""}`:             1,
		`aegis_request_duration_seconds_count{service="svc",kind="rpc",endpoint="m"}`:             5,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="0.001"}`: 2,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="50"}`:    5,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="+Inf"}`:  5,
		`aegis_connections{service="svc"}`:                                                        2,
		`aegis_leader{service="svc",group="default"}`:                                             1,
		`aegis_breaker_open{service="svc",target="svc"}`:                                          0,
		`aegis_in_flight{service="svc",kind="rpc",endpoint="m"}`:                                  0,
		`aegis_shed_total{service="svc",kind="rpc",endpoint="m"}`:                                 0,
		`aegis_expired_total{service="svc",kind="rpc",endpoint="m"}`:                              0,
		`aegis_pending{service="svc",kind="event",endpoint="order.*"}`:                            0,
	} {
		if got, ok := samples[sample]; !ok || got != want {
			t.Errorf("%s is %v %v, want %v", sample, got, ok, want)
		}
	}
	if sum := samples[`aegis_request_duration_seconds_sum{service="svc",kind="rpc",endpoint="m"}`]; sum < 0.006 || sum > 5 {
		t.Errorf("%v s in all", sum)
	}
	if up := samples[`aegis_uptime_seconds{service="svc"}`]; up <= 0 || up > 60 {
		t.Errorf("up for %v s", up)
	}
	last := 0.0 // buckets are cumulative
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, `aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m"`) {
			value, _ := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
			if value < last {
				t.Errorf("less than before: %s", line)
			}
			last = value
		}
	}
}

func TestProbes(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	var broken atomic.Bool
	svc := newService(t, srv, "svc", aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("database", func(context.Context) error {
		if broken.Load() {
			return errors.New("connection refused")
		}
		return nil
	}), aegis.WithHealthCheck("disk", func(context.Context) error { return nil }))
	inside, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "m", func(context.Context, string) (string, error) {
		close(inside)
		<-release
		return "", nil
	})
	expect := func(path string, want int, words ...string) {
		t.Helper()
		status, body := get(t, svc, path)
		var parsed struct {
			Status string
			Checks map[string]string
		}
		if err := json.Unmarshal([]byte(body), &parsed); err != nil || status != want || (parsed.Status == "ok") != (want == http.StatusOK) {
			t.Errorf("%s answers %d %s, want %d", path, status, body, want)
		}
		for _, w := range words {
			if !strings.Contains(body, w) {
				t.Errorf("%s answers %s, without %s", path, body, w)
			}
		}
	}
	expect("/healthz", 200)
	expect("/readyz", 503, `"service":"UNAVAILABLE: `, "not been started")
	start(t, svc)
	expect("/readyz", 200, `"database":"ok"`, `"disk":"ok"`, `"connection":"ok"`)
	broken.Store(true)
	eventually(t, "it isn't ready", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"database":"INTERNAL: connection refused"`, `"disk":"ok"`)
	expect("/healthz", 200)
	broken.Store(false)
	eventually(t, "it is ready again", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })

	again := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "it isn't ready", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"connection":"UNAVAILABLE: `)
	expect("/healthz", 200)
	srv = startServer(t, again)
	eventually(t, "it is ready again", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })
	eventually(t, "both connections are back", func() bool { return svc.Stats().Connected == 2 })

	client := newService(t, srv, "client")
	eventually(t, "the server knows the handler again", func() bool {
		go func() { _, _ = call[string, string](client, "svc", "m", "", aegis.Sticky()) }()
		select {
		case <-inside:
			return true
		case <-time.After(time.Second):
			return false
		}
	})
	stopped := make(chan error)
	go func() { stopped <- svc.Stop(t.Context()) }()
	eventually(t, "it isn't ready", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"service":"CLOSED: `, "stopping")
	expect("/healthz", 200) // it finishes what runs
	close(release)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	expect("/healthz", 503, "svc was stopped")
	expect("/readyz", 503)
	if status, _ := get(t, svc, "/"); status != http.StatusNotFound {
		t.Error(status)
	}
}

// TestNATSServices asks as the nats tool does, and checks what the schemas of its answers require:
// https://github.com/nats-io/jsm.go/tree/main/schema_source/micro/v1
func TestNATSServices(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var ids []string
	add := func(name, id string) *aegis.Service {
		svc := newService(t, srv, name, aegis.WithID(id), aegis.WithVersion("1.2.3"), aegis.WithMetadata(map[string]string{"zone": "eu"}))
		handle(t, svc, "m", func(_ context.Context, s string) (string, error) {
			if s == "" {
				return "", &aegis.Error{Code: "EMPTY", Message: "say something"}
			}
			return s, nil
		})
		handle(t, svc, "alone", echo, aegis.Exclusive())
		subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error { return nil })
		subscribe(t, svc, "order.>", func(context.Context, aegis.Event[int]) error { return nil })
		handleCommand(t, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
		start(t, svc)
		ids = append(ids, svc.ID())
		return svc
	}
	a := add("risk", "node-1")
	add("risk", "node-2")
	add("shop", "node-1") // an id is unique in its service only
	for _, s := range []string{"x", "y", ""} {
		_, _ = call[string, string](a, "risk", "m", s, aegis.ToInstance(a.ID()))
	}
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	ask := func(subject string, want int) (answers []map[string]any) {
		t.Helper()
		inbox := nats.NewInbox()
		sub, err := nc.SubscribeSync(inbox)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sub.Unsubscribe() }()
		if err := nc.PublishRequest(subject, inbox, nil); err != nil {
			t.Fatal(err)
		}
		for len(answers) < want {
			m, err := sub.NextMsg(10 * time.Second)
			if err != nil {
				t.Fatalf("%d answers to %s: %v", len(answers), subject, err)
			}
			var v map[string]any
			if err := json.Unmarshal(m.Data, &v); err != nil {
				t.Fatalf("%s: %v: %s", subject, err, m.Data)
			}
			answers = append(answers, v)
		}
		if m, err := sub.NextMsg(50 * time.Millisecond); err == nil {
			t.Errorf("one answer too many to %s: %s", subject, m.Data)
		}
		return answers
	}
	name := regexp.MustCompile(`^[a-zA-Z0-9_-]+$`)
	for verb, required := range map[string][]string{"PING": {}, "INFO": {"description", "endpoints"}, "STATS": {"started", "endpoints"}} {
		required = append(required, "type", "name", "id", "version", "metadata")
		var seen []string
		for _, v := range slices.Concat(ask("$SRV."+verb, 3), ask("$SRV."+verb+".risk", 2), ask("$SRV."+verb+".risk."+a.ID(), 1)) {
			for _, key := range required {
				if v[key] == nil {
					t.Errorf("%s has no %s: %v", verb, key, v)
				}
			}
			if v["type"] != "io.nats.micro.v1."+strings.ToLower(verb)+"_response" || v["version"] != "1.2.3" || v["metadata"].(map[string]any)["zone"] != "eu" {
				t.Errorf("%s: %v", verb, v)
			}
			seen = append(seen, fmt.Sprint(v["id"]))
			if verb == "PING" {
				continue
			}
			var endpoints []string
			for _, e := range v["endpoints"].([]any) {
				e := e.(map[string]any)
				required := []string{"name", "subject", "queue_group"}
				if verb == "STATS" {
					required = append(required, "num_requests", "num_errors", "last_error", "processing_time", "average_processing_time", "data")
				}
				for _, key := range required {
					if e[key] == nil {
						t.Errorf("%s has an endpoint without %s: %v", verb, key, e)
					}
				}
				if !name.MatchString(fmt.Sprint(e["name"])) {
					t.Errorf("the name %v", e["name"])
				}
				endpoints = append(endpoints, fmt.Sprint(e["name"], " ", e["subject"], " ", e["queue_group"]))
			}
			service := fmt.Sprint(v["name"])
			want := []string{
				"alone rpc." + service + ".alone " + service, "m rpc." + service + ".m " + service,
				"order-ALL events.order.> " + service, "order-ANY events.order.* " + service, "work commands." + service + ".work " + service,
			}
			if got := sorted(endpoints); !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", verb, got, want)
			}
		}
		if want := sorted(slices.Concat(ids, ids[:2], ids[:1])); !slices.Equal(sorted(seen), want) {
			t.Errorf("%s: answers of %v, want %v", verb, sorted(seen), want)
		}
	}
	for _, e := range ask("$SRV.STATS.risk."+a.ID(), 1)[0]["endpoints"].([]any) {
		e := e.(map[string]any)
		if e["name"] != "m" {
			continue
		}
		data := e["data"].(map[string]any)
		if e["num_requests"] != 3.0 || e["num_errors"] != 1.0 || e["last_error"] != "risk: EMPTY: say something" || e["processing_time"].(float64) <= 0 || e["average_processing_time"].(float64) <= 0 ||
			data["p50_ns"].(float64) <= 0 || data["p99_ns"].(float64) < data["p50_ns"].(float64) || data["in_flight"] != 0.0 || data["shed"] != 0.0 {
			t.Errorf("%v", e)
		}
	}
}

func TestTraceTravels(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	const trace, state = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "a=1"
	var hops journal[string]
	// Each handler is a span of its own, as a tracer's middleware makes them.
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
			return errors.New("not yet") // the second attempt belongs to the same trace
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

// Each line that is about a message names it as the handler does.
func TestLogsNameTheRequest(t *testing.T) {
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
	eventually(t, "all is logged", func() bool { return strings.Count(logged.String(), "dead letter") == 2 })
	var about []line
	for text := range strings.Lines(logged.String()) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if l.Service != "risk" || l.Instance != svc.ID() {
			t.Errorf("whose is this? %s", text)
		}
		if l.Endpoint != "" {
			about = append(about, l)
		}
	}
	if len(about) != 5+2+2 { // panics, failed attempts, dead letters
		t.Errorf("%d lines: %s", len(about), logged.String())
	}
	for _, l := range about {
		if l.Error == nil || !slices.Contains(ids.all(), l.ID) || l.Endpoint == "order.*" && l.ID != "event-1" || l.Endpoint == "work" && l.ID != "command-1" {
			t.Errorf("%+v is about none of %v", l, ids.all())
		}
	}
}

func TestDependencies(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	web, lost := newService(t, srv, "web"), newService(t, srv, "lost")
	var risks []*aegis.Service
	for range 2 {
		risk := newService(t, srv, "risk")
		handle(t, risk, "check", func(_ context.Context, n int) (int, error) {
			if n < 0 {
				return 0, &aegis.Error{Code: "NEGATIVE"}
			}
			return n, nil
		})
		start(t, risk)
		risks = append(risks, risk)
	}
	shop := newService(t, srv, "shop")
	handle(t, shop, "buy", func(ctx context.Context, n int) (int, error) {
		return aegis.Call[int, int](ctx, shop, "risk", "check", n)
	})
	subscribe(t, shop, "order.*", func(context.Context, aegis.Event[int]) error { return nil })
	start(t, shop)
	for _, n := range []int{1, 2, 3, -1, -2} {
		_, _ = call[int, int](web, "shop", "buy", n)
	}
	for _, risk := range risks {
		if _, err := call[int, int](lost, "risk", "check", 1, aegis.ToInstance(risk.ID())); err != nil {
			t.Error(err)
		}
	}
	publish(t, web, "order", "placed", 1)
	eventually(t, "it is handled", func() bool { return endpointStats(t, shop, "event", "order.*").Requests == 1 })

	// Others answer, too: a service that isn't of aegis, and one that talks nonsense.
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := micro.AddService(nc, micro.Config{Name: "plain", Version: "1.0.0", Endpoint: &micro.EndpointConfig{Subject: "plain", Handler: micro.HandlerFunc(func(micro.Request) {})}}); err != nil {
		t.Fatal(err)
	}
	for _, nonsense := range []string{"", "[]", `{"endpoints":[null,{"data":[]},{"data":{"callers":7}}]}`, "\xff\xff"} {
		if _, err := nc.Subscribe("$SRV.STATS", func(m *nats.Msg) { _ = m.Respond([]byte(nonsense)) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	deps, err := lost.Dependencies(t.Context())
	want := []aegis.Dependency{
		{From: "lost", To: "risk", Endpoint: "check", Requests: 2},
		{From: "shop", To: "risk", Endpoint: "check", Requests: 5, Errors: 2},
		{From: "web", To: "shop", Endpoint: "buy", Requests: 5, Errors: 2},
		{From: "web", To: "shop", Endpoint: "order.*", Requests: 1},
	}
	if err != nil || !slices.Equal(deps, want) {
		t.Errorf("got %v, %v\nwant %v", deps, err, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = lost.Dependencies(ctx)
	fails(t, err, aegis.ErrTimeout)
	if err := lost.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = lost.Dependencies(t.Context())
	fails(t, err, aegis.ErrClosed)
}

func TestMermaid(t *testing.T) {
	t.Parallel()
	if got := aegis.Mermaid(nil); got != "flowchart LR\n" {
		t.Errorf("%q", got)
	}
	got := aegis.Mermaid([]aegis.Dependency{
		{From: "end", To: "b", Endpoint: `order.>|"x"`, Requests: 3, Errors: 1}, // end is a word of Mermaid's
		{From: "end", To: "b", Endpoint: "m", Requests: 1},
		{From: "b", To: "b", Endpoint: "self", Requests: 2},
	})
	want := `flowchart LR
    s0["b"]
    s1["end"]
    s1 -->|"order.#62;#124;#34;x#34;: 3, 1 failed<br>m: 1"| s0
    s0 -->|"self: 2"| s0
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// Permissions.

// allowances are those of a row of the README's table, and of the rows that it names.
func allowances(tb testing.TB, who string) (publish, subscribe []string) {
	tb.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		tb.Fatal(err)
	}
	subject := regexp.MustCompile("`([^` ]+\\.[^` ]+)`")
	for line := range strings.Lines(string(readme)) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || !strings.HasPrefix(strings.TrimSpace(cells[1]), who) {
			continue
		}
		sure, _, _ := strings.Cut(cells[2], ";") // what comes behind isn't needed for each little thing
		for _, m := range subject.FindAllStringSubmatch(sure, -1) {
			publish = append(publish, m[1])
		}
		for _, m := range subject.FindAllStringSubmatch(cells[3], -1) {
			subscribe = append(subscribe, m[1])
		}
		if _, beside, ok := strings.Cut(cells[1], "(+ "); ok {
			p, s := allowances(tb, strings.TrimRight(beside, ") "))
			publish, subscribe = append(publish, p...), append(subscribe, s...)
		}
		return publish, subscribe
	}
	tb.Fatalf("the README has no row of %s", who)
	return nil, nil
}

// That a service may not listen on a subject says nothing about a call to the same one.
func TestDenialOfSomethingElse(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: &server.Permissions{Subscribe: &server.SubjectPermission{Deny: []string{"rpc.svc.m"}}}}}
	})
	svc := newService(t, srv, "svc", aegis.WithNATS(nats.UserInfo("admin", "")))
	running, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "m", func(_ context.Context, n int) (int, error) { close(running); <-release; return n, nil })
	start(t, svc)
	both := newService(t, srv, "svc", aegis.WithNATS(nats.UserInfo("user", "")))
	result := make(chan error)
	go func() {
		_, err := call[int, int](both, "svc", "m", 1)
		result <- err
	}()
	<-running
	handle(t, both, "m", func(_ context.Context, n int) (int, error) { return n, nil })
	fails(t, both.Start(t.Context()), aegis.ErrDenied, "subscribe to rpc.svc.m")
	close(release)
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// TestPermissions has a server that allows each role what the README says, which has to be enough; and then all of that but one
// subject, which has to fail, with an error that names it: so the README names no subject too many.
func TestPermissions(t *testing.T) {
	t.Parallel()
	type env struct {
		*testing.T
		srv   *server.Server
		admin *aegis.Service // may do anything
		user  aegis.Option
	}
	within := func(e env, ctx context.Context, what string, ok func() bool) error {
		for !ok() {
			if ctx.Err() != nil {
				return fmt.Errorf("never: %s", what)
			}
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	served := func(e env, ctx context.Context, prepare func(s *aegis.Service) error) (*aegis.Service, error) {
		s := newService(e, e.srv, "orders", e.user, aegis.WithFailover(aegis.Aggressive))
		if err := prepare(s); err != nil {
			return nil, err
		}
		return s, s.Start(ctx)
	}
	target := func(e env) *aegis.Service { // of callers
		s := newService(e, e.srv, "orders", aegis.WithNATS(nats.UserInfo("admin", "")), aegis.WithFailover(aegis.Aggressive))
		handle(e, s, "create", echo)
		handleCommand(e, s, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
			time.Sleep(200 * time.Millisecond) // the sender hears of it before
			return c.Data, nil
		})
		start(e, s)
		return s
	}
	for who, exercise := range map[string]func(e env, ctx context.Context) error{
		"service": func(e env, ctx context.Context) error {
			if _, err := served(e, ctx, func(s *aegis.Service) error { return aegis.Handle(s, "create", echo) }); err != nil {
				return err
			}
			_, err := aegis.Call[string, string](ctx, e.admin, "orders", "create", "x")
			return err
		},
		"it subscribes": func(e env, ctx context.Context) error {
			var got journal[int]
			failed := false
			_, err := served(e, ctx, func(s *aegis.Service) error {
				return aegis.Subscribe(s, "order.*", func(_ context.Context, ev aegis.Event[int]) error {
					if got.add(ev.Data); ev.Data == 2 && !failed {
						failed = true
						return errors.New("it goes to the dead letters")
					}
					return nil
				}, aegis.Attempts(1), aegis.Concurrency(1))
			})
			for i := 1; err == nil && i <= 3; i++ {
				err = aegis.Publish(ctx, e.admin, "order", "created", i)
			}
			if err != nil {
				return err
			}
			return within(e, ctx, "all come", func() bool { return slices.Equal(got.all(), []int{1, 2, 3}) })
		},
		"it handles commands": func(e env, ctx context.Context) error {
			_, err := served(e, ctx, func(s *aegis.Service) error {
				return aegis.HandleCommand(s, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
					if c.Data == "fail" {
						return "", errors.New("it goes to the dead letters")
					}
					return c.Data, c.Progress(50, "")
				}, aegis.Attempts(1))
			})
			for _, data := range []string{"x", "fail", "y"} {
				if err != nil {
					return err
				}
				var j *aegis.Job[string]
				if j, err = aegis.SendCommand[string, string](ctx, e.admin, "orders", "work", data); err == nil {
					if _, err = j.Wait(ctx); data == "fail" && errors.Is(err, aegis.ErrInternal) {
						err = nil
					}
				}
			}
			return err
		},
		"it leads": func(e env, ctx context.Context) error {
			s, err := served(e, ctx, func(s *aegis.Service) error { return aegis.Handle(s, "create", echo, aegis.Exclusive()) })
			if err != nil {
				return err
			}
			if _, err := s.Leader(ctx); err != nil && !errors.Is(err, aegis.ErrNotFound) {
				return err
			}
			return within(e, ctx, "it leads", s.IsLeader)
		},
		"caller": func(e env, ctx context.Context) error {
			target(e)
			_, err := aegis.Call[string, string](ctx, newService(e, e.srv, "shop", e.user), "orders", "create", "x")
			return err
		},
		"it discovers": func(e env, ctx context.Context) error {
			target(e)
			shop := newService(e, e.srv, "shop", e.user)
			if list, err := shop.Discover(ctx, "orders"); err != nil || len(list) != 1 {
				return err
			}
			_, err := aegis.Call[string, string](ctx, shop, "orders", "create", "x", aegis.Balance(aegis.Random))
			return err
		},
		"it publishes": func(e env, ctx context.Context) error {
			s := newService(e, e.srv, "shop", e.user)
			if err := aegis.Publish(ctx, s, "order", "created", 1); err != nil {
				return err
			}
			return aegis.PublishBatch(ctx, s, "order", "created", []int{1, 2, 3})
		},
		"it sends commands": func(e env, ctx context.Context) error {
			target(e)
			shop := newService(e, e.srv, "shop", e.user)
			j, err := aegis.SendCommand[string, string](ctx, shop, "orders", "work", "x")
			if err == nil {
				_, err = j.Wait(ctx)
			}
			return err
		},
		"an operator": func(e env, ctx context.Context) error {
			s := target(e)
			broken := true
			subscribe(e, s, "order.*", func(context.Context, aegis.Event[int]) error {
				if broken {
					return errors.New("broken")
				}
				return nil
			}, aegis.Attempts(1))
			handleCommand(e, s, "fail", func(context.Context, *aegis.Command[string]) (string, error) { return "", errors.New("broken") }, aegis.Attempts(1))
			if err := aegis.Publish(ctx, e.admin, "order", "created", 1); err != nil {
				return err
			}
			if _, err := aegis.SendCommand[string, string](ctx, e.admin, "orders", "fail", ""); err != nil {
				return err
			}
			operator := newService(e, e.srv, "operator", e.user)
			if _, err := operator.Dependencies(ctx); err != nil {
				return err
			}
			letters := map[string]aegis.DeadLetter{}
			for len(letters) < 2 {
				for d, err := range operator.DeadLetters(ctx) {
					if err != nil {
						return err
					}
					letters[d.Subject] = d
				}
			}
			for _, d := range letters {
				if err := operator.Redrive(ctx, d); err != nil {
					return err
				}
			}
			return nil
		},
	} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			publish, subscribe := allowances(t, who)
			without := func(t *testing.T, missing string) error {
				p, s := slices.DeleteFunc(slices.Clone(publish), func(x string) bool { return x == missing }), slices.DeleteFunc(slices.Clone(subscribe), func(x string) bool { return x == missing })
				permissions := &server.Permissions{Publish: &server.SubjectPermission{Allow: append(p, "none")}, Subscribe: &server.SubjectPermission{Allow: append(s, "none")}} // an empty list allows all
				if who == "service" || strings.HasPrefix(who, "it ") && slices.Contains(publish, "service.orders.*") {
					permissions.Response = &server.ResponsePermission{MaxMsgs: server.DEFAULT_ALLOW_RESPONSE_MAX_MSGS, Expires: server.DEFAULT_ALLOW_RESPONSE_EXPIRATION}
				}
				srv := startServer(t, withJetStream(t), func(o *server.Options) {
					o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: permissions}}
				})
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				admin := newService(t, srv, "admin", aegis.WithNATS(nats.UserInfo("admin", "")))
				handle(t, admin, "m", echo, aegis.Exclusive()) // makes the streams and buckets
				handleCommand(t, admin, "m", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
				start(t, admin)
				if err := aegis.Publish(ctx, admin, "x", "y", 1); err != nil {
					t.Fatal(err)
				}
				return exercise(env{t, srv, admin, aegis.WithNATS(nats.UserInfo("user", ""))}, ctx)
			}
			if err := without(t, ""); err != nil {
				t.Fatal("what the README says is not enough:", err)
			}
			for _, missing := range slices.Concat(publish, subscribe) {
				t.Run(missing, func(t *testing.T) {
					t.Parallel()
					err := without(t, missing)
					if e := fails(t, err, aegis.ErrDenied); !strings.Contains(e.Message, strings.TrimRight(missing, ">*")) {
						t.Errorf("it doesn't name it: %v", e)
					}
				})
			}
		})
	}
}

// Stop doesn't wait for what it may not do: the consumer of a broadcast is left to expire.
func TestStopWithoutPermissionToDelete(t *testing.T) {
	t.Parallel()
	publish, subscribe := allowances(t, "it subscribes")
	permissions := &server.Permissions{Publish: &server.SubjectPermission{Allow: publish}, Subscribe: &server.SubjectPermission{Allow: subscribe}}
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: permissions}}
	})
	admin := newService(t, srv, "admin", aegis.WithNATS(nats.UserInfo("admin", "")))
	if err := aegis.Subscribe(admin, "x.y", into(&journal[int]{})); err != nil { // makes the streams
		t.Fatal(err)
	}
	start(t, admin)
	svc := newService(t, srv, "orders", aegis.WithNATS(nats.UserInfo("user", "")))
	var got journal[int]
	if err := aegis.Subscribe(svc, "order.*", into(&got), aegis.Broadcast()); err != nil {
		t.Fatal(err)
	}
	start(t, svc)
	begin := time.Now()
	if err := svc.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 500*time.Millisecond {
		t.Errorf("it took %v", d)
	}
}

func TestTLSAndCredentials(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:        true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(certificate)
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		o.TLS = true
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
		o.Users = []*server.User{{Username: "orders", Password: "secret"}}
	})
	trust, login := nats.Secure(&tls.Config{RootCAs: roots}), nats.UserInfo("orders", "secret")
	svc := newService(t, srv, "orders", aegis.WithNATS(trust, login))
	handle(t, svc, "create", echo)
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) { return c.Data, nil })
	start(t, svc)
	if got, err := call[string, string](svc, "orders", "create", "x"); got != "x" || err != nil {
		t.Error(got, err)
	}
	if got := wait(t, send[string, string](t, svc, "orders", "work", "y")); got != "y" {
		t.Error(got)
	}
	if _, err := svc.Conn().TLSConnectionState(); err != nil {
		t.Errorf("not encrypted: %v", err)
	}
	promptly(t, func() {
		for word, opts := range map[string][]nats.Option{
			"certificate":   {nats.Secure(&tls.Config{}), login},
			"Authorization": {trust, nats.UserInfo("orders", "wrong")},
		} {
			_, err := aegis.New("orders", aegis.WithURL(srv.ClientURL()), aegis.WithNATS(opts...))
			fails(t, err, aegis.ErrUnavailable, word, srv.Addr().String())
		}
	})
}

// Everything at once.

// handleAll adds what children in the role of soak serve. Each event that was handled is printed, and when an exclusive call ran.
func handleAll(svc *aegis.Service) error {
	return errors.Join(
		aegis.Handle(svc, "echo", echo),
		aegis.Handle(svc, "alone", func(ctx context.Context, s string) (string, error) {
			from := time.Now().UnixNano()
			time.Sleep(time.Millisecond)
			if ctx.Err() == nil {
				fmt.Println("alone", aegis.Term(ctx), from, time.Now().UnixNano())
			}
			return s, nil
		}, aegis.Exclusive()),
		aegis.Subscribe(svc, "order.*", func(_ context.Context, e aegis.Event[int]) error {
			fmt.Println("event", e.Data)
			return nil
		}, aegis.Attempts(100)),
		aegis.HandleCommand(svc, "work", func(_ context.Context, c *aegis.Command[int]) (string, error) {
			_ = c.Progress(50, "half") // if it was cancelled or taken over, its result won't count
			time.Sleep(5 * time.Millisecond)
			return fmt.Sprint(c.Data, " by ", svc.ID(), " ", c.Attempt), nil
		}, aegis.Attempts(100)),
	)
}

// TestSoak puts three instances under load of all kinds, and does to them what happens: the server is restarted, one is killed, one
// paused, one stopped, connections are cut. With -full it goes on for three minutes. No acknowledged event is lost, each command has
// one outcome, no two terms serve exclusively at once, and each call gets an answer or an error in time.
func TestSoak(t *testing.T) { // not beside others, since it takes all there is
	store := withJetStream(t)
	srv := startServer(t, store)
	port := onPort(srv)
	p := startProxy(t, srv)
	events := map[int]int{} // handled, how often
	var exclusive []reignOf
	var mu sync.Mutex // guards both
	add := func() *process {
		child := startProcess(t, "soak", srv, "NATS_URL=nats://"+p.address)
		ready, told := make(chan struct{}), make(chan string)
		child.told = told
		go func() {
			defer close(told)
			for line := range child.lines {
				var n int
				r := reignOf{who: strconv.Itoa(child.Process.Pid)}
				mu.Lock()
				if k, _ := fmt.Sscanf(line, "event %d", &n); k == 1 {
					events[n]++
				} else if k, _ := fmt.Sscanf(line, "alone %d %d %d", &r.term, &r.from, &r.to); k == 3 {
					exclusive = append(exclusive, r)
				} else if line == "ready" {
					close(ready)
				}
				mu.Unlock()
			}
		}()
		select {
		case <-ready:
		case <-time.After(30 * time.Second):
			t.Fatal("the child isn't ready")
		}
		return child
	}
	stop := func(child *process) {
		_ = child.input.Close()
		for range child.told {
		}
	}
	stop(add()) // makes the streams and consumers
	js := manage(t, srv)
	consumers := func() (names []string) {
		for _, stream := range []string{"AEGIS_EVENTS", "AEGIS_COMMANDS", "KV_aegis_registry", "KV_aegis_leaders", "KV_aegis_commands"} {
			st, err := js.Stream(t.Context(), stream)
			if err != nil {
				t.Fatal(err)
			}
			list := st.ConsumerNames(t.Context())
			for name := range list.Name() {
				names = append(names, name)
			}
			if list.Err() != nil {
				t.Fatal(list.Err())
			}
		}
		return sorted(names)
	}
	durable := slices.DeleteFunc(consumers(), func(name string) bool { return !strings.HasPrefix(name, "risk~") }) // one of a watch goes a moment later
	idle := srv.NumSubscriptions()
	instances := []*process{add(), add(), add()}
	quick := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	client := newService(t, srv, "shop", quick)

	// Load. Whoever does it counts what went well.
	done := make(chan struct{})
	var load sync.WaitGroup
	progress := map[string]*atomic.Int64{"call": {}, "event": {}, "command": {}, "exclusive": {}}
	run := func(kind string, allowed time.Duration, fn func(ctx context.Context, n int) error) {
		for i := range 3 {
			load.Go(func() {
				for n := i; ; n += 3 {
					select {
					case <-done:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(context.Background(), allowed)
					begin := time.Now()
					err := fn(ctx, n)
					cancel()
					var e *aegis.Error
					if took := time.Since(begin); took > allowed+3*time.Second {
						t.Errorf("%s: %v after %v", kind, err, took)
					}
					if err == nil {
						progress[kind].Add(1)
					} else if !errors.As(err, &e) || e.Code == "" {
						t.Errorf("%s: no typed error: %v", kind, err)
					}
				}
			})
		}
	}
	answered := func(method string, opts ...aegis.CallOption) func(ctx context.Context, n int) error {
		return func(ctx context.Context, n int) error {
			want := fmt.Sprint(method, n)
			got, err := aegis.Call[string, string](ctx, client, "risk", method, want, opts...)
			if err == nil && got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			return err
		}
	}
	var stored journal[int]
	var jobs journal[string]
	run("call", time.Second, answered("echo")) // a third goes to the instance that is paused
	run("exclusive", 10*time.Second, answered("alone", aegis.Sticky(), aegis.Idempotent()))
	run("event", 10*time.Second, func(ctx context.Context, n int) error {
		err := aegis.Publish(ctx, client, "order", "created", n, aegis.Sticky())
		if err == nil {
			stored.add(n)
		}
		return err
	})
	run("command", 10*time.Second, func(ctx context.Context, n int) error {
		key := fmt.Sprint("job-", n)
		_, err := aegis.SendCommand[int, string](ctx, client, "risk", "work", n, aegis.IdempotencyKey(key), aegis.Sticky())
		if err == nil {
			jobs.add(key)
		}
		time.Sleep(10 * time.Millisecond)
		return err
	})
	flows := func(after string) {
		t.Helper()
		for kind, n := range progress {
			was := n.Load()
			eventually(t, kind+" goes on after "+after, func() bool { return n.Load() > was+3 })
		}
	}
	flows("the start")
	for end := time.Now().Add(3 * time.Minute); ; {
		p.cut()
		flows("a cut")
		if err := instances[0].Process.Kill(); err != nil {
			t.Fatal(err)
		}
		instances[0] = add()
		flows("a kill")
		if err := instances[1].Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second) // longer than its lease
		flows("a pause")
		if err := instances[1].Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		flows("its end")
		stop(instances[2])
		instances[2] = add()
		flows("a stop")
		srv.Shutdown()
		srv.WaitForShutdown()
		srv = startServer(t, port, store)
		flows("a restart of the server")
		if !*full || time.Now().After(end) {
			break
		}
	}
	close(done)
	load.Wait()

	// All that was confirmed has been done.
	eventually(t, "all events are handled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return !slices.ContainsFunc(stored.all(), func(n int) bool { return events[n] == 0 })
	})
	outcomes := map[string]string{}
	for range 2 { // the same both times
		for _, key := range jobs.all() {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			result, err := aegis.Attach[string](client, "risk", "work", key).Wait(ctx)
			cancel()
			if err != nil || !strings.HasPrefix(result, strings.TrimPrefix(key, "job-")+" by ") || outcomes[key] != "" && outcomes[key] != result {
				t.Errorf("%s: %q, %v; before: %q", key, result, err, outcomes[key])
			}
			outcomes[key] = result
		}
	}
	letters := 0
	for d, err := range client.DeadLetters(t.Context()) {
		letters++
		t.Errorf("a dead letter: %s %v", d.Reason, err)
	}
	t.Logf("%d calls, %d exclusive, %d events, %d commands; %d dead letters", progress["call"].Load(), progress["exclusive"].Load(), len(stored.all()), len(outcomes), letters)
	mu.Lock()
	slices.SortFunc(exclusive, func(a, b reignOf) int { return cmp.Compare(a.from, b.from) })
	latest := reignOf{}
	for _, r := range exclusive {
		if r.from < latest.to && r.term != latest.term || r.term < latest.term {
			t.Errorf("term %d of %s ran while term %d of %s did", r.term, r.who, latest.term, latest.who)
		}
		if r.to > latest.to {
			latest = r
		}
	}
	mu.Unlock()

	// Nothing is left behind.
	for _, child := range instances {
		stop(child)
	}
	if err := client.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	for end := time.Now().Add(time.Minute); !slices.Equal(consumers(), durable); time.Sleep(100 * time.Millisecond) { // the server takes its time
		if time.Now().After(end) {
			t.Fatalf("consumers %v, at first %v", consumers(), durable)
		}
	}
	eventually(t, fmt.Sprint("there are no more subscriptions than ", idle), func() bool { return srv.NumSubscriptions() <= idle })
}

// Whoever may publish can send anything anywhere. Nothing of it crashes an instance, takes its memory, or keeps it from its work.
func TestHostileInput(t *testing.T) { // not beside others, since it takes all there is
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "risk", aegis.WithID("a")), newService(t, srv, "shop")
	handle(t, svc, "echo", echo)
	handle(t, svc, "create_order", createOrder)
	var got journal[int]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[Order]) error { got.add(e.Data.Qty); return nil }, aegis.Attempts(1))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[Order]) (int, error) { return c.Data.Qty, c.Progress(50, "") })
	start(t, svc)
	if r := wait(t, send[Order, int](t, client, "risk", "work", Order{Qty: 1})); r != 1 {
		t.Fatal(r)
	}
	if _, err := client.Discover(t.Context(), "risk"); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(srv.ClientURL(), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // it overhears more than it takes
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	random := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	valid, _ := aegis.MsgPack.Marshal(Order{SKU: "x", Qty: 666, Tags: map[string]string{"a": "b"}})
	payloads := [][]byte{
		nil, {}, {0x80}, {0xc1}, []byte("null"), []byte("true"), []byte("[1,2]"), []byte(`"text"`), []byte(`{"sku":7}`), []byte("{\"sku\":\"\xff\xfe\"}"),
		[]byte(`{"qty":1e999999}`), []byte(strings.Repeat("[", 100_000)), []byte(strings.Repeat(`{"tags":`, 50_000)), []byte(`{"sku":"` + strings.Repeat("x", 900_000) + `"}`),
		{0xdd, 0xff, 0xff, 0xff, 0xff}, {0xdf, 0xff, 0xff, 0xff, 0xff}, {0xc6, 0xff, 0xff, 0xff, 0xff}, {0xdb, 0xff, 0xff, 0xff, 0xff}, {0xc9, 0x7f, 0xff, 0xff, 0xff, 1},
		bytes.Repeat([]byte{0x91}, 100_000), bytes.Repeat([]byte{0x81, 0xa1, 'a'}, 50_000), bytes.Repeat([]byte{0}, 900_000), noise(900_000),
	}
	for i := range valid {
		payloads = append(payloads, valid[:i])
	}
	headers := []nats.Header{
		nil, {"Content-Type": {"application/json"}}, {"Content-Type": {"application/vnd.msgpack", "x"}}, {"Content-Type": {""}}, {"Status": {"503"}}, {"Status": {"408"}, "Nats-Pending-Messages": {"-5"}},
		{"Status": {"404"}, "Nats-Pending-Messages": {"99999999999999999999"}}, {"Nats-Service-Error-Code": {"200"}}, {"Nats-Service-Error-Code": {"x"}, "Nats-Service-Error": {strings.Repeat("e", 100_000)}},
		{"Aegis-Correlation-Id": {strings.Repeat("c", 10_000)}}, {"traceparent": {"nonsense"}}, {"Aegis-Id": {"a.b*>"}, "Aegis-Subject": {"events.x"}, "Aegis-Time": {"never"}}, {"Aegis-Source": {"not a name"}},
		{"Nats-Sequence": {"-1"}}, {"Nats-Sequence": {"18446744073709551615"}},
	}
	subjects := []string{
		"rpc.risk.echo", "rpc.risk.echo.a", "rpc.risk.create_order", "rpc.risk.$cancel", "$SRV.PING", "$SRV.INFO.risk", "$SRV.STATS.risk.a", "$SRV.NOTHING",
		"events.order.created", "events.$redrive.risk~order~+", "commands.risk.work", "commands.risk.work.critical",
		"$KV.aegis_registry.risk.x", "$KV.aegis_registry.risk.x.y", "$KV.aegis_commands.risk.work.x", "aegis.jobs.risk.work.x", "service.risk.register",
	}
	// Replies nobody asked for, to those that wait and those that did: the subjects are overheard.
	overheard := make(chan *nats.Msg, 64)
	eavesdropping, err := nc.ChanSubscribe("_INBOX.>", overheard)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	stop := hammer(t, client, 4, "risk", "echo", func(err error) { t.Error(err) })
	end := time.Now().Add(3 * time.Second)
	sent := 0
	for time.Now().Before(end) || sent < 3000 {
		m := &nats.Msg{Subject: subjects[random.IntN(len(subjects))], Data: payloads[random.IntN(len(payloads))]}
		if sent%5 == 0 {
			m.Data = noise(random.IntN(64))
		}
		m.Reply = []string{"", "_INBOX.mine", "_INBOX.x.ABCDEFGHIJKL.1.1.99999999999999", "_INBOX..1", "rpc.risk.echo", "a b"}[random.IntN(5)]
		select {
		case heard := <-overheard: // ours, or what the service answers others
			m.Subject = heard.Subject
		default:
		}
		if !strings.HasPrefix(m.Subject, "$KV.") && !strings.HasPrefix(m.Subject, "events.$") {
			m.Header = headers[random.IntN(len(headers))]
		}
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(m.Subject, err)
		}
		if sent++; sent%50 == 0 {
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if calls := stop(); calls < 100 {
		t.Errorf("%d calls went through", calls)
	}
	if err := eavesdropping.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	for len(overheard) > 0 {
		<-overheard
	}
	publish(t, client, "order", "created", Order{Qty: 4711})
	eventually(t, "the event gets through", func() bool { return slices.Contains(got.all(), 4711) })
	if r := wait(t, send[Order, int](t, client, "risk", "work", Order{Qty: 7})); r != 7 {
		t.Error(r)
	}
	eventually(t, "who is there shows", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	eventually(t, "memory is what it was, about", func() bool { return heap() < before+64<<20 })
	t.Logf("%d messages, %d MB more", sent, (int64(heap())-int64(before))>>20)
}

// Three times as much is asked for as can be done: what can be done is, and the rest is refused at once, be it that handlers wait, or
// that they take all the CPU there is. It is measured again, twice at most, if it looks bad: something else may keep the machine busy.
func TestGoodputUnderOverload(t *testing.T) { // not beside others
	var sink atomic.Uint64
	compute := func() { // some 10 ms, also with -race
		x := uint64(1)
		for range 10_000_000 {
			x = x*6364136223846793005 + 1442695040888963407
		}
		sink.Add(x)
	}
	for _, c := range []struct {
		name        string
		work        func()
		concurrency int
		quick       time.Duration
	}{
		{"waiting", func() { time.Sleep(20 * time.Millisecond) }, 8, 200 * time.Millisecond},
		{"computing", compute, runtime.GOMAXPROCS(0), time.Second}, // each of a dozen hops waits for its slice of the CPU, 10 ms or more
	} {
		t.Run(c.name, func(t *testing.T) {
			for round := 1; ; round++ {
				goodput, took := overload(t, c.work, c.concurrency)
				if goodput >= 0.8 && took < c.quick {
					return
				}
				if round == 3 {
					t.Fatalf("goodput is %.2f of capacity, and it took up to %v to be refused", goodput, took)
				}
			}
		})
	}
}

// overload is which part of its capacity a service does under three times as much load, and how long it took at most to be refused.
func overload(t *testing.T, work func(), concurrency int) (goodput float64, took time.Duration) {
	t.Helper()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	handle(t, svc, "m", func(_ context.Context, n int) (int, error) { work(); return n, nil }, aegis.Concurrency(concurrency))
	start(t, svc)
	const phase = time.Second
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	var done, refused, slowest atomic.Int64 // slowest in ns, of those that were refused
	one := func() {
		begin := time.Now()
		switch _, err := call[int, int](client, "svc", "m", 1); {
		case err == nil:
			done.Add(1)
		case errors.Is(err, aegis.ErrOverloaded):
			refused.Add(1)
			for took, was := int64(time.Since(begin)), slowest.Load(); took > was && !slowest.CompareAndSwap(was, took); was = slowest.Load() {
			}
		default:
			t.Error(err)
		}
	}
	var callers sync.WaitGroup
	begin := time.Now()
	for range concurrency + max(concurrency/2, 1) { // some run, some wait
		callers.Go(func() {
			for time.Since(begin) < phase {
				one()
			}
		})
	}
	callers.Wait()
	capacity := float64(done.Load()) / time.Since(begin).Seconds()
	before := heap()
	done.Store(0)
	refused.Store(0)
	offered := 0
	begin = time.Now()
	for time.Since(begin) < phase { // whether there are answers or not
		for due := int(3 * capacity * time.Since(begin).Seconds()); offered < due; offered++ {
			callers.Go(one)
		}
		time.Sleep(time.Millisecond)
	}
	goodput = float64(done.Load()) / time.Since(begin).Seconds() / capacity
	more := heap() - before
	callers.Wait()
	took = time.Duration(slowest.Load())
	t.Logf("capacity %.0f/s, offered %.0f/s, goodput %.2f of it, %d refused, the slowest after %v, %d kB more",
		capacity, float64(offered)/phase.Seconds(), goodput, refused.Load(), took, more>>10)
	if int(done.Load()+refused.Load()) != offered || refused.Load() < int64(offered)/3 {
		t.Errorf("%d done and %d refused of %d", done.Load(), refused.Load(), offered)
	}
	if more > 16<<20 {
		t.Errorf("%d MB more", more>>20)
	}
	return goodput, took
}
