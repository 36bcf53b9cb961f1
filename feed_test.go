package aegis_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
)

// startSlowLink starts a proxy in front of a server, which delivers everything that much later, and at most that many bytes per
// second. It returns its address.
func startSlowLink(tb testing.TB, srv *server.Server, latency time.Duration, rate int) string {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = listener.Close() })
	delay := func(to, from net.Conn) {
		type chunk struct {
			data []byte
			due  time.Time
		}
		chunks := make(chan chunk, 128)
		go func() {
			defer close(chunks)
			for {
				buf := make([]byte, 32<<10)
				n, err := from.Read(buf)
				if err != nil {
					return
				}
				chunks <- chunk{buf[:n], time.Now().Add(latency)}
			}
		}()
		for c := range chunks {
			time.Sleep(time.Until(c.due))
			if _, err := to.Write(c.data); err != nil {
				break
			}
			time.Sleep(time.Duration(len(c.data)) * time.Second / time.Duration(rate))
		}
		_ = to.Close()
		_ = from.Close()
		for range chunks { // until the reader has ended
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			backend, err := net.Dial("tcp", srv.Addr().String())
			if err != nil {
				_ = client.Close()
				return
			}
			go delay(backend, client)
			go delay(client, backend)
		}
	}()
	return listener.Addr().String()
}

// A handler of commands asks JetStream some twenty questions when it starts. Over a slow link, or on a busy machine, that takes longer
// than the time limit of one question.
func TestStartOverSlowLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	link := startSlowLink(t, srv, 130*time.Millisecond, 1<<30)
	svc := newService(t, srv, "risk", aegis.WithURL("nats://"+link))
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) { return c.Data + 1, nil })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := svc.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if r := wait(t, send[int, int](t, newService(t, srv, "shop"), "risk", "work", 1)); r != 2 {
		t.Errorf("got %d, want 2", r)
	}
}

// deliveries counts how often each event was handled.
type deliveries struct {
	mu sync.Mutex // guards n
	n  map[int]int
}

func (d *deliveries) handle(_ context.Context, e aegis.Event[int]) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.n == nil {
		d.n = map[int]int{}
	}
	d.n[e.Data]++
	return nil
}

func (d *deliveries) all() map[int]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.n)
}

// eachOnce reports whether each of the events from 0 to n-1 was handled once. It fails the test if one was handled twice.
func (d *deliveries) eachOnce(tb testing.TB, n int) bool {
	tb.Helper()
	got := d.all()
	for i, times := range got {
		if times != 1 || i < 0 || i >= n {
			tb.Fatalf("event %d was handled %d times; want each of %d once", i, times, n)
		}
	}
	return len(got) == n
}

// ackPending returns how many messages of a consumer are delivered and not acknowledged.
func ackPending(tb testing.TB, srv *server.Server, stream, consumer string) int {
	tb.Helper()
	c, err := manage(tb, srv).Consumer(tb.Context(), stream, consumer)
	if err != nil {
		return -1 // the server has just started
	}
	return c.CachedInfo().NumAckPending
}

// Handlers that return before, while and after the server is away are acknowledged, so that no event is handled twice, and none
// becomes a dead letter.
func TestAcknowledgementsWhileServerIsAway(t *testing.T) {
	t.Parallel()
	for name, abrupt := range map[string]bool{"restart": false, "cut": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := withJetStream(t)
			srv := startServer(t, store)
			p := startProxy(t, srv)
			svc, publisher := newService(t, srv, "risk", aegis.WithURL("nats://"+p.address)), newService(t, srv, "shop")
			const n = 200
			var got deliveries
			var running sync.WaitGroup
			running.Add(n)
			begin := make(chan struct{})
			subscribe(t, svc, "order.*", func(ctx context.Context, e aegis.Event[int]) error {
				_ = got.handle(ctx, e)
				running.Done()
				<-begin
				time.Sleep(time.Duration(e.Data) * 15 * time.Millisecond)
				return nil
			}, aegis.Attempts(1), aegis.Concurrency(n))
			start(t, svc)
			for i := range n {
				publish(t, publisher, "order", "created", i)
			}
			running.Wait()
			close(begin)
			time.Sleep(200 * time.Millisecond)
			if abrupt { // what was sent last is lost
				p.stall()
				time.Sleep(100 * time.Millisecond)
				p.cut()
				time.Sleep(2 * time.Second)
				p.heal()
			} else {
				samePort := onPort(srv)
				srv.Shutdown()
				srv.WaitForShutdown()
				time.Sleep(2 * time.Second)
				srv = startServer(t, samePort, store)
			}
			eventually(t, "all events are acknowledged", func() bool { return ackPending(t, srv, "AEGIS_EVENTS", "risk~order~+") == 0 })
			if !got.eachOnce(t, n) {
				t.Errorf("got %d events, want %d", len(got.all()), n)
			}
			if letters := deadLetters(t, newService(t, srv, "operator")); len(letters) > 0 {
				t.Errorf("got %d dead letters: %s", len(letters), letters[0].Reason)
			}
		})
	}
}

// Large events over a slow link are asked for in small numbers, so that the server does not cut the connection, and calls are not held
// up by them.
func TestLargeEventsOverSlowLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	publisher := newService(t, srv, "shop")
	const n = 150
	for i := range n {
		publish(t, publisher, "order", "created", fmt.Sprintf("%03d%0*d", i, 400_000+i*3000, 0))
	}
	link := startSlowLink(t, srv, time.Millisecond, 40<<20)
	svc := newService(t, srv, "risk", aegis.WithURL("nats://"+link))
	handle(t, publisher, "m", echo)
	start(t, publisher)
	var got journal[string]
	subscribe(t, svc, "order.*", func(_ context.Context, e aegis.Event[string]) error {
		got.add(fmt.Sprint(e.Data[:3], " ", e.Attempt))
		return nil
	}, aegis.FromStart(), aegis.Concurrency(n))
	start(t, svc)
	for len(got.all()) < n {
		if _, err := call[string, string](svc, "shop", "m", "hi"); err != nil {
			t.Fatal(err)
		}
	}
	want := make([]string, n)
	for i := range n {
		want[i] = fmt.Sprintf("%03d 1", i)
	}
	if all := sorted(got.all()); fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("got %v", all)
	}
}

// A stream that was removed and made anew, or that came back empty, is handled from its beginning, although its sequences are among
// those that were handled before.
func TestStreamMadeAnew(t *testing.T) {
	t.Parallel()
	for name, wipe := range map[string]bool{"removed": false, "wiped": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			p := startProxy(t, srv)
			first, publisher := newService(t, srv, "risk"), newService(t, srv, "shop")
			var got deliveries
			subscribe(t, first, "order.*", got.handle)
			start(t, first)
			for i := range 20 {
				publish(t, publisher, "order", "created", i)
			}
			eventually(t, "20 events are handled", func() bool { return got.eachOnce(t, 20) })
			eventually(t, "they are acknowledged", func() bool { return ackPending(t, srv, "AEGIS_EVENTS", "risk~order~+") == 0 })
			if err := first.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			second := newService(t, srv, "risk", aegis.WithURL("nats://"+p.address)) // knows from its start that 20 are acknowledged
			subscribe(t, second, "order.*", got.handle)
			start(t, second)
			p.stall()
			p.cut()
			if wipe {
				samePort := onPort(srv)
				srv.Shutdown()
				srv.WaitForShutdown()
				srv = startServer(t, samePort, withJetStream(t))
			} else if err := manage(t, srv).DeleteStream(t.Context(), "AEGIS_EVENTS"); err != nil {
				t.Fatal(err)
			}
			for i := range 100 {
				publish(t, publisher, "order", "created", 20+i, aegis.Sticky())
			}
			p.heal()
			eventually(t, "all events of the new stream are handled", func() bool { return got.eachOnce(t, 120) })
		})
	}
}

// TestFailedSubscriptionsTakeNoShare lets HandleCommand fail after Start. The subscriptions that work still ask for as many bytes as
// before.
func TestFailedSubscriptionsTakeNoShare(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	nc := rawConn(t, srv.ClientURL())
	pulls, err := nc.SubscribeSync("$JS.API.CONSUMER.MSG.NEXT.AEGIS_EVENTS.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	nextLimit := func() (limit struct {
		MaxBytes int `json:"max_bytes"`
	}) {
		m, err := pulls.NextMsg(10 * time.Second)
		for err == nil && len(m.Data) == 0 { // a probe of the permission
			m, err = pulls.NextMsg(10 * time.Second)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(m.Data, &limit); err != nil {
			t.Fatal(err)
		}
		return limit
	}
	config := jetstream.StreamConfig{Name: "AEGIS_COMMANDS", Subjects: []string{"commands.>"}} // can't be used: it is no work queue
	if _, err := manage(t, srv).CreateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	svc := newService(t, srv, "risk")
	subscribe(t, svc, "order.*", into(&journal[int]{}), aegis.Concurrency(2))
	start(t, svc)
	before := nextLimit()
	for range 5 {
		err := aegis.HandleCommand(svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
		fails(t, err, aegis.ErrInvalid, "AEGIS_COMMANDS")
	}
	publish(t, svc, "order", "created", 1)
	if after := nextLimit(); after != before {
		t.Errorf("a pull request asks for up to %d bytes, and for %d before the failures", after.MaxBytes, before.MaxBytes)
	}
}

// TestLargeCommandsOverSlowLink handles commands each of which takes longer than a second to arrive. Each is delivered once: without
// that, one would be redelivered after the ack wait of 10 s, again and again.
func TestLargeCommandsOverSlowLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var jobs []*aegis.Job[int]
	for range 3 {
		jobs = append(jobs, send[string, int](t, client, "risk", "work", strings.Repeat("x", 600_000)))
	}
	link := startSlowLink(t, srv, time.Millisecond, 400<<10)
	svc := newService(t, srv, "risk", aegis.WithURL("nats://"+link))
	var handled journal[int]
	handleCommand(t, svc, "work", func(_ context.Context, c *aegis.Command[string]) (int, error) {
		handled.add(c.Attempt)
		return len(c.Data), nil
	})
	begin := time.Now()
	start(t, svc)
	for _, j := range jobs {
		if n := wait(t, j); n != 600_000 {
			t.Errorf("got %d", n)
		}
	}
	if took := time.Since(begin); took > 9*time.Second { // the ack wait is 10 s
		t.Errorf("3 commands took %v", took)
	}
}
