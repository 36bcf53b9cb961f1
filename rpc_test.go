package aegis_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
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
				for n := range 200 { // a single byte can be valid MessagePack and valid JSON
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
		t.Errorf("a successful answer has headers: %v", m.Header)
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
		t.Errorf("for a caller without a deadline, the handler has %v, want the 5 s of WithTimeout", time.Duration(ns))
	}
	if id := <-sources; id == "" {
		t.Error("a request from a plain NATS client has no correlation ID")
	}
	if err := nc.Publish("rpc.order-service.deadline", []byte(`{}`)); err != nil { // has no reply subject
		t.Fatal(err)
	}
	if id := <-sources; id == "" {
		t.Error("a message without a reply subject has no correlation ID")
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
			t.Error("NotRun = false, want true")
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
			t.Error("NotRun = false, want true")
		}
		_, err = call[string, string](client, "svc", "nothing", "")
		if e := fails(t, err, aegis.ErrUnimplemented, "rpc.svc.nothing", "one", "1.2.3"); !e.NotRun {
			t.Error("NotRun = false, want true")
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

func TestUndecodablePayload(t *testing.T) {
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
			t.Errorf("%.20q: got code %q, want 400", data, code)
		}
	}
	m, err := nc.RequestMsg(&nats.Msg{Subject: "rpc.svc.m", Data: []byte("<x/>"), Header: nats.Header{"Content-Type": {"text/xml"}}}, 5*time.Second)
	if err != nil || !strings.Contains(m.Header.Get("Nats-Service-Error"), "text/xml") {
		t.Errorf("got %v, %v", m, err)
	}
	_, err = call[string, Receipt](client, "svc", "m", "not an order")
	if e := fails(t, err, aegis.ErrInvalid, "rpc.svc.m"); !e.NotRun {
		t.Error("NotRun = false, want true")
	}
	_, err = call[Order, int](client, "svc", "m", Order{})
	if e := fails(t, err, aegis.ErrInternal, "svc.m"); e.NotRun {
		t.Error("NotRun = true, want false: the handler ran")
	}
	if got, err := call[Order, Receipt](client, "svc", "m", Order{SKU: "x"}); got.ID != "x-0" || err != nil {
		t.Error(got, err)
	}
}

func TestPayloadTooLarge(t *testing.T) {
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
			t.Error("NotRun = true, want false: the handler ran")
		}
		_, err = call[int, []byte](client, "svc", "fail", 40<<10)
		fails(t, err, &aegis.Error{Code: "HUGE"}, "32768")
		_, err = call[[]byte, int](client, "svc", "take", make([]byte, 40<<10))
		if e := fails(t, err, aegis.ErrInvalid, "32768", "rpc.svc.take"); !e.NotRun {
			t.Error("NotRun = false, want true")
		}
		if got, err := call[int, []byte](client, "svc", "repeat", 20<<10); len(got) != 20<<10 || err != nil {
			t.Error(len(got), err)
		}
	})
}

func TestInstancesShareLoad(t *testing.T) {
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
	eventually(t, "the other instances handle more calls", func() bool { return handled[0].Load() > first+200 })
	if handled[1].Load() != second {
		t.Error("the stopped instance still handles calls")
	}
	if calls := stop(); calls != handled[0].Load()+handled[1].Load()+handled[2].Load() {
		t.Errorf("%d calls succeeded, but the instances handled %d + %d + %d", calls, handled[0].Load(), handled[1].Load(), handled[2].Load())
	}
}

func TestCircuitBreaker(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	client := newService(t, srv, "client", aegis.WithBreaker(aegis.BreakerPolicy{Failures: 3, Cooldown: 100 * time.Millisecond}))
	for range 3 {
		_, err := call[int, int](client, "svc", "m", 1)
		fails(t, err, aegis.ErrUnavailable)
	}
	_, err := call[int, int](client, "svc", "m", 1)
	if e := fails(t, err, aegis.ErrCircuitOpen, "svc", "3 times"); !e.NotRun {
		t.Error("NotRun = false, want true")
	}
	_, err = call[int, int](client, "other", "m", 1)
	fails(t, err, aegis.ErrUnavailable) // each service has its own circuit breaker

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
	_, err = call[int, int](client, "svc", "m", 1) // only one probe may be in flight
	fails(t, err, aegis.ErrCircuitOpen)
	close(release)
	if err := <-probe; err != nil {
		t.Error(err)
	}
	for range 10 { // errors that a handler returns do not open the circuit breaker
		_, err := call[int, int](client, "svc", "refuse", 1)
		fails(t, err, aegis.ErrInternal)
	}
	for range 10 { // nor do calls that the caller cancels
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := aegis.Call[int, int](ctx, client, "svc", "refuse", 1)
		fails(t, err, aegis.ErrCanceled)
	}
	_, err = call[int, int](client, "svc", "refuse", 1)
	fails(t, err, aegis.ErrInternal)
}

// FuzzRequest sends a service arbitrary payloads with arbitrary reply subjects and headers, and checks that the service still
// answers.
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

// FuzzAnswer sends a caller arbitrary answers, and checks that each call succeeds or fails with a typed error.
func FuzzAnswer(f *testing.F) {
	srv := startServer(f)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(nc.Close)
	var answer atomic.Pointer[nats.Msg]
	_, err = nc.Subscribe("rpc.svc.m", func(m *nats.Msg) {
		if m.RespondMsg(answer.Load()) != nil { // nats.go does not send a header whose key is not an HTTP token
			_ = m.Respond(nil)
		}
	})
	if err != nil {
		f.Fatal(err)
	}
	client := newService(f, srv, "client")
	f.Add([]byte("{}"), "Nats-Service-Error-Code", "404")
	f.Add([]byte("{}"), "Nats-Service-Error-Code", "504")
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

// A CallAll reaches every instance, and tells which of them answered what.
func TestCallAll(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "client")
	ctx := t.Context()
	canceled := make(chan string, 10)
	var instances []*aegis.Service
	for _, id := range []string{"a", "b", "c"} {
		svc := newService(t, srv, "cache", aegis.WithID(id), aegis.WithFailover(aegis.Aggressive))
		handle(t, svc, "flush", func(_ context.Context, n int) (string, error) { return fmt.Sprint(id, n), nil })
		handle(t, svc, "uneven", func(_ context.Context, n int) (string, error) {
			switch id {
			case "a":
				return "half", &aegis.Error{Code: "BUSY"}
			case "b":
				panic("broken")
			}
			return "well", nil
		})
		handle(t, svc, "slow", func(ctx context.Context, _ int) (string, error) {
			if id == "c" {
				return "first", nil
			}
			<-ctx.Done()
			canceled <- id
			return "", ctx.Err()
		})
		handle(t, svc, "single", func(context.Context, int) (string, error) { return "led by " + id, nil }, aegis.Exclusive())
		if id == "c" { // the others don't have it
			handle(t, svc, "new", func(context.Context, int) (string, error) { return "new", nil })
		}
		start(t, svc)
		instances = append(instances, svc)
	}
	eventually(t, "one instance leads", func() bool {
		return slices.ContainsFunc(instances, (*aegis.Service).IsLeader)
	})
	all := func(ctx context.Context, method string, opts ...aegis.CallOption) (answers []string) {
		for a, err := range aegis.CallAll[int, string](ctx, client, "cache", method, 7, opts...) {
			code := "OK"
			if err != nil {
				code = fails(t, err, err.(*aegis.Error)).Code
			}
			answers = append(answers, strings.TrimSpace(a.Instance+" "+code+" "+a.Data))
		}
		slices.Sort(answers)
		return answers
	}
	eventually(t, "the client knows all instances", func() bool { return len(all(ctx, "flush")) == 3 })
	for method, want := range map[string][]string{
		"flush":  {"a OK a7", "b OK b7", "c OK c7"},
		"uneven": {"a BUSY", "b INTERNAL", "c OK well"},
		"new":    {"a UNIMPLEMENTED", "b UNIMPLEMENTED", "c OK new"},
		"none":   {"a UNIMPLEMENTED", "b UNIMPLEMENTED", "c UNIMPLEMENTED"},
	} {
		if got := all(ctx, method); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", method, got, want)
		}
	}
	led := all(ctx, "single")
	if text := strings.Join(led, "; "); strings.Count(text, "NOT_ACTIVE") != 2 || strings.Count(text, "OK led by") != 1 {
		t.Errorf("got %q, want one answer and two NOT_ACTIVE", led)
	}

	// Each call has the deadline of ctx; those that have answered before are not affected.
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	promptly(t, func() {
		if got, want := all(short, "slow"), []string{"a DEADLINE_EXCEEDED", "b DEADLINE_EXCEEDED", "c OK first"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	<-canceled
	<-canceled
	// Leaving the loop cancels the calls that have no answer yet.
	promptly(t, func() {
		for a, err := range aegis.CallAll[int, string](ctx, client, "cache", "slow", 7) {
			if a.Instance != "c" || err != nil {
				t.Error(a, err)
			}
			break
		}
		if got := sorted([]string{<-canceled, <-canceled}); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("cancelled %q, want a and b", got)
		}
	})
	if n := endpointStats(t, client, "call", "cache.slow").InFlight; n != 0 {
		t.Errorf("%d calls are in flight after CallAll has returned", n)
	}

	// What can't be called at all is one error.
	single := func(kind *aegis.Error, service, method string, opts ...aegis.CallOption) {
		t.Helper()
		n := 0
		for a, err := range aegis.CallAll[int, string](ctx, client, service, method, 7, opts...) {
			n++
			if e := fails(t, err, kind); !e.NotRun || a.Instance != "" {
				t.Errorf("got %+v and instance %q, want NotRun and no instance", e, a.Instance)
			}
		}
		if n != 1 {
			t.Errorf("%d results, want 1", n)
		}
	}
	single(aegis.ErrUnavailable, "nobody", "flush")
	single(aegis.ErrInvalid, "no service", "flush")
	single(aegis.ErrInvalid, "cache", "no-method")
	single(aegis.ErrInvalid, "cache", "flush", aegis.Sticky())
	single(aegis.ErrInvalid, "cache", "flush", aegis.ToInstance("a"))
	single(aegis.ErrInvalid, "cache", "flush", aegis.Balance(aegis.Random))
	single(aegis.ErrInvalid, "cache", "flush", aegis.Retry(aegis.RetryPolicy{Attempts: -1}))

	// An instance that has stopped is not asked.
	if err := instances[0].Stop(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client knows that a has stopped", func() bool { return slices.Equal(all(ctx, "flush"), []string{"b OK b7", "c OK c7"}) })
	if err := client.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	single(aegis.ErrClosed, "cache", "flush")
}

// The circuit breakers are bounded, and those of other services don't hold up a call.
func TestManyCircuitBreakers(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	client := newService(t, srv, "client", aegis.WithBreaker(aegis.BreakerPolicy{Failures: 1, Cooldown: time.Minute}))
	first := newService(t, srv, "first")
	handle(t, first, "m", echo)
	start(t, first)
	if _, err := call[string, string](client, "first", "m", "hi"); err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			for n := range 500 {
				_, err := call[string, string](client, fmt.Sprintf("none-%d-%d", i, n), "m", "hi")
				fails(t, err, aegis.ErrUnavailable)
			}
		})
	}
	callers.Wait()
	if n := len(client.Stats().Breakers); n > 1100 {
		t.Errorf("%d circuit breakers after calls to 4,000 services", n)
	}
	if _, body := get(t, client, "/metrics"); strings.Count(body, "aegis_breaker_open{") > 1100 {
		t.Errorf("%d series of aegis_breaker_open", strings.Count(body, "aegis_breaker_open{"))
	}
	for _, name := range []string{"svc", "OTHERS"} {
		svc := newService(t, srv, name)
		handle(t, svc, "m", echo)
		start(t, svc)
		if got, err := call[string, string](client, name, "m", "hi"); got != "hi" || err != nil {
			t.Error(got, err)
		}
	}
	if err := first.Stop(t.Context()); err != nil { // those that there are go on working
		t.Fatal(err)
	}
	_, err := call[string, string](client, "first", "m", "hi")
	fails(t, err, aegis.ErrUnavailable)
	_, err = call[string, string](client, "first", "m", "hi")
	fails(t, err, aegis.ErrCircuitOpen)
}

// withAccounts makes two accounts, whose users have the same names: backend exports its services, and frontend imports them.
func withAccounts(tb testing.TB) func(*server.Options) {
	tb.Helper()
	file := filepath.Join(tb.TempDir(), "accounts.conf")
	config := `accounts {
		backend {
			users [{user: backend, password: x}]
			exports [{service: "rpc.>"}, {service: "$SRV.>", response_type: stream}]
		}
		frontend {
			users [{user: frontend, password: x}]
			imports [{service: {account: backend, subject: "rpc.>"}}, {service: {account: backend, subject: "$SRV.>"}}]
		}
	}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		tb.Fatal(err)
	}
	accounts, err := server.ProcessConfigFile(file)
	if err != nil {
		tb.Fatal(err)
	}
	return func(o *server.Options) { o.Accounts, o.Users = accounts.Accounts, accounts.Users }
}

// The server replaces the reply subject of a call to another account. What it says travels in headers, too, if the caller wants it.
func TestCallToAnotherAccount(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withAccounts(t))
	var seen journal[string]
	sources := aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			seen.add(m.Source)
			return next(ctx, m)
		}
	})
	svc := newService(t, srv, "svc", aegis.WithNATS(nats.UserInfo("backend", "x")), sources, aegis.WithTimeout(time.Second))
	type remaining struct {
		Left time.Duration
		ID   string
	}
	handle(t, svc, "ctx", func(ctx context.Context, _ int) (remaining, error) {
		deadline, _ := ctx.Deadline()
		return remaining{time.Until(deadline), aegis.CorrelationID(ctx)}, nil
	})
	handle(t, svc, "fail", func(ctx context.Context, _ int) (int, error) { return 0, &aegis.Error{Code: "NO_FUNDS"} })
	handle(t, svc, "hang", func(ctx context.Context, _ int) (int, error) {
		<-ctx.Done()
		return 0, ctx.Err()
	})
	start(t, svc)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	for _, codec := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
		plain := newService(t, srv, "shop", aegis.WithNATS(nats.UserInfo("frontend", "x")), aegis.WithCodec(codec))
		if got, err := aegis.Call[int, remaining](ctx, plain, "svc", "ctx", 1); err != nil || got.Left > time.Second {
			t.Errorf("without WithWireHeaders, got %+v and error %v, want the service's own timeout", got, err)
		}
		client := newService(t, srv, "shop", aegis.WithNATS(nats.UserInfo("frontend", "x")), aegis.WithWireHeaders(), aegis.WithCodec(codec))
		for _, opts := range [][]aegis.CallOption{nil, {aegis.ToInstance(svc.ID())}, {aegis.Retry(aegis.RetryPolicy{})}} {
			got, err := aegis.Call[int, remaining](aegis.WithHeader(ctx, "Aegis-Correlation-Id", "order-7"), client, "svc", "ctx", 1, opts...)
			if err != nil || got.Left < 5*time.Second-time.Millisecond || got.Left > 6*time.Second || got.ID != "order-7" {
				t.Errorf("got %+v and error %v, want 5 to 6 s and order-7", got, err)
			}
		}
		if got, err := aegis.Call[int, remaining](ctx, client, "svc", "ctx", 1); err != nil || got.ID == "" {
			t.Errorf("got %+v and error %v, want a correlation id", got, err)
		}
		_, err := aegis.Call[int, int](ctx, client, "svc", "fail", 1)
		fails(t, err, &aegis.Error{Code: "NO_FUNDS"})
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err = aegis.Call[int, int](short, client, "svc", "hang", 1)
		e := fails(t, err, aegis.ErrTimeout)
		if id := e.Details["correlation_id"]; e.Source == "" && id == "" {
			t.Errorf("the error %+v has no correlation id", e)
		}
		cancel()
		_, err = aegis.Call[int, int](ctx, client, "svc", "none", 1)
		fails(t, err, aegis.ErrUnimplemented)
		_, err = aegis.Call[int, int](ctx, client, "nobody", "m", 1)
		fails(t, err, aegis.ErrUnavailable)
	}
	for i, source := range seen.all() {
		if want := "shop"; i%7 == 0 && source != "" || i%7 != 0 && source != want {
			t.Errorf("message %d came from %q", i, source)
		}
	}
}

// Any NATS client can send a deadline in the header Aegis-Timeout.
func TestTimeoutHeader(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "left", func(ctx context.Context, _ int) (int64, error) {
		deadline, _ := ctx.Deadline()
		return time.Until(deadline).Milliseconds(), nil
	})
	inside, release := make(chan struct{}, 10), make(chan struct{})
	var ran atomic.Int32
	handle(t, svc, "busy", func(context.Context, int) (int, error) {
		ran.Add(1)
		inside <- struct{}{}
		<-release
		return 0, nil
	}, aegis.Concurrency(1))
	start(t, svc)
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	request := func(method, timeout string) *nats.Msg {
		m := nats.NewMsg("rpc.svc." + method)
		m.Data, m.Header = []byte("1 "), nats.Header{"Aegis-Timeout": {timeout}, "Aegis-Source": {"legacy"}}
		return m
	}
	for timeout, want := range map[string]int64{"1.5s": 1500, "1500": 1500, "1m": 60_000, "87600h": 365 * 24 * 3600 * 1000, "20000ms": 20_000, "": 5000} {
		answer, err := nc.RequestMsg(request("left", timeout), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		var left int64
		if err := json.Unmarshal(answer.Data, &left); err != nil || left > want || left < want-1000 {
			t.Errorf("Aegis-Timeout %q: the handler has %s ms left, want nearly %d", timeout, answer.Data, want)
		}
	}
	if callers := endpointStats(t, svc, "rpc", "left").Callers; callers["legacy"] != 6 {
		t.Errorf("the calls came from %v, want 6 from legacy", callers)
	}
	for _, timeout := range []string{"abc", "-1s", "0", "0s", "NaN", "1e9999s", "-5", "1.5", strings.Repeat("9", 400), "\"1s\""} {
		answer, err := nc.RequestMsg(request("left", timeout), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if text := answer.Header.Get("Nats-Service-Error"); answer.Header.Get("Nats-Service-Error-Code") != "400" || !strings.Contains(text, "Aegis-Timeout") || len(text) > 200 {
			t.Errorf("Aegis-Timeout %q is answered with %v", timeout, answer.Header)
		}
	}
	// A request whose time was up while it waited is not run.
	inbox := nats.NewInbox()
	for _, timeout := range []string{"1m", "50ms"} {
		m := request("busy", timeout)
		m.Reply = inbox
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
		if timeout == "1m" {
			<-inside
		}
	}
	time.Sleep(100 * time.Millisecond)
	close(release)
	eventually(t, "the second request has expired", func() bool { return endpointStats(t, svc, "rpc", "busy").Expired == 1 })
	if n := ran.Load(); n != 1 {
		t.Errorf("%d requests ran, want 1", n)
	}
}

// Middleware may answer a request without a payload with data that looks like the acknowledgement of a stream.
func TestMiddlewareAnswersEmptyRequest(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	const data = `{"stream":"orders","seq":1}`
	svc := newService(t, srv, "risk", aegis.WithMiddleware(func(aegis.HandlerFunc) aegis.HandlerFunc {
		return func(context.Context, *aegis.Message) ([]byte, error) { return []byte(data), nil }
	}))
	handle(t, svc, "m", echo)
	start(t, svc)
	answer, err := rawConn(t, srv.ClientURL()).Request("rpc.risk.m", nil, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if string(answer.Data) != data || answer.Header.Get("Content-Type") != "application/json" {
		t.Errorf("got %q %v", answer.Data, answer.Header)
	}
}
