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
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
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

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the helpers that all tests share (servers, services, child processes, a proxy that can cut connections), and the
// tests of a service's lifecycle and of the system as a whole.

// TestMain runs the tests, and fails if goroutines of the library or of nats.go remain after all services have stopped. In a
// child process it calls runChild instead.
func TestMain(m *testing.M) {
	if child := os.Getenv("AEGIS_TEST_CHILD"); child != "" {
		os.Exit(runChild(child))
	}
	flag.Parse()
	if bench := flag.Lookup("test.bench"); bench.Value.String() != "" {
		fmt.Print(legend)
	}
	code := m.Run()
	if code == 0 {
		if left := leakedGoroutines(10 * time.Second); left != "" {
			fmt.Fprintln(os.Stderr, "goroutines left behind:\n"+left)
			code = 1
		}
	}
	os.Exit(code)
}

// leakedGoroutines returns the stacks of the goroutines that still run in aegis or nats.go after timeout.
func leakedGoroutines(timeout time.Duration) string {
	for end := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
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

var full = flag.Bool("full", false, "kill 20 leaders per failover policy, and soak for three minutes")

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
		tb.Fatal("the server did not start within 10 s")
	}
	return srv
}

var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32N(12000)) }

// freePort returns a port that no other test gets. The port is below the range from which systems assign ports by themselves, so
// that a server can listen on it again after a restart.
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

// onPort makes startServer listen on the port of an earlier server.
func onPort(srv *server.Server) func(*server.Options) {
	port := srv.Addr().(*net.TCPAddr).Port
	return func(o *server.Options) { o.Port = port }
}

// withJetStream enables JetStream. Servers that are started with the same option, one after another, share one store directory.
func withJetStream(tb testing.TB) func(*server.Options) {
	dir := tb.TempDir()
	return func(o *server.Options) { o.JetStream, o.StoreDir = true, dir }
}

// startCluster runs a cluster of n servers with JetStream until the test ends.
func startCluster(tb testing.TB, n int) []*server.Server {
	tb.Helper()
	servers, _ := startClusterToRestart(tb, n)
	return servers
}

// startClusterToRestart is startCluster for a test that starts servers again after it has shut them down.
func startClusterToRestart(tb testing.TB, n int) (servers []*server.Server, startAgain func(i int)) {
	tb.Helper()
	ports, routes := make([]int, n), make([]string, n)
	for i := range n {
		ports[i] = freePort(tb)
		routes[i] = fmt.Sprint("nats://127.0.0.1:", ports[i])
	}
	servers = make([]*server.Server, n)
	stores, clientPorts := make([]func(*server.Options), n), make([]int, n)
	startAgain = func(i int) {
		servers[i] = startServer(tb, stores[i], func(o *server.Options) {
			o.ServerName, o.Port = fmt.Sprint("n", i), clientPorts[i]
			o.Cluster = server.ClusterOpts{Name: "c", Host: "127.0.0.1", Port: ports[i]}
			o.Routes = server.RoutesFromStr(strings.Join(routes, ","))
		})
	}
	var starting sync.WaitGroup
	for i := range servers {
		stores[i], clientPorts[i] = withJetStream(tb), freePort(tb)
		starting.Go(func() { startAgain(i) })
	}
	starting.Wait()
	eventually(tb, "the cluster has a leader that all servers follow", func() bool {
		return slices.ContainsFunc(servers, func(s *server.Server) bool {
			return s.JetStreamIsLeader() && len(s.JetStreamClusterPeers()) == n
		})
	})
	return servers, startAgain
}

// newService returns a service that is stopped when the test ends.
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
		_ = s.Stop(ctx) // fails if the server has already stopped
	})
	return s
}

// rawConn makes a connection of nats.go, without aegis, which ends with the test.
func rawConn(tb testing.TB, url string) *nats.Conn {
	tb.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	return nc
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

func call[Req, Resp any](s *aegis.Service, service, method string, req Req, opts ...aegis.CallOption) (Resp, error) {
	return aegis.Call[Req, Resp](context.Background(), s, service, method, req, opts...)
}

// eventually waits until ok returns true, and fails the test after 20 s. The text what names the condition.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("timed out waiting until %s", what)
		}
	}
}

// fails checks that err has the code of kind and mentions all words, and returns it as an *aegis.Error.
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

// promptly fails the test if fn takes more than 2 s, because it then has probably waited for a timeout.
func promptly(tb testing.TB, fn func()) {
	tb.Helper()
	begin := time.Now()
	fn()
	if took := time.Since(begin); took > 2*time.Second {
		tb.Errorf("took %v, want at most 2 s", took)
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

// A safeBuffer is a bytes.Buffer that several goroutines may use.
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

// A journal collects values from handlers. Several goroutines may use it.
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

// wait waits until there are n entries, and returns all of them.
func (l *journal[T]) wait(tb testing.TB, n int) []T {
	tb.Helper()
	for end := time.Now().Add(20 * time.Second); len(l.all()) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("timed out waiting for %d entries; got %v", n, l.all())
		}
	}
	return l.all()
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}

// manage returns a JetStream client that is independent of aegis, for the tasks of an operator.
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

// limitMessages makes a stream reject messages larger than size.
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

// A process is a child process: this test's binary, run again in one of the roles of runChild.
type process struct {
	*exec.Cmd
	lines chan string   // the lines that the child prints
	told  <-chan string // the lines that startLeader does not handle itself; closed when the output ends
	input io.WriteCloser
}

// startProcess runs a child process until the test ends. The settings are environment variables.
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
		_ = p.Process.Kill() // fails if the child has already exited
		<-read
		_ = p.Wait()
	})
	return p
}

// line returns the next line that the child prints. If the child's output has ended, ok is false.
func (p *process) line(tb testing.TB) (line string, ok bool) {
	tb.Helper()
	select {
	case line, ok = <-p.lines:
	case <-time.After(20 * time.Second):
		tb.Fatal("the child printed nothing for 20 s")
	}
	return line, ok
}

// runChild is the main function of a child process in the given role. It returns when the child's standard input ends.
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
		case "leader": // serves an exclusive method, and prints each period in which it leads
			err = handleExclusively(svc)
			go reign(context.Background(), svc, func(r reignOf) { fmt.Println("reign", r.from, r.to) })
		case "idle":
			err = aegis.Handle(svc, "create_order", createOrder)
			n, _ := strconv.Atoi(os.Getenv("AEGIS_TEST_SUBSCRIPTIONS"))
			for i := range n {
				err = errors.Join(err, aegis.Subscribe(svc, fmt.Sprintf("order.t%d", i), func(context.Context, aegis.Event[int]) error { return nil }))
			}
		case "watching": // prints a line when Watch yields a list
			go func() {
				for list, err := range svc.Watch(context.Background(), "svc") {
					if len(list) == 2000 || err != nil {
						fmt.Println("watching", len(list), err)
					}
				}
			}()
		case "soak":
			err = handleAll(svc)
		case "events": // prints each event; the data SLEEP and EXIT make the handler sleep and the process exit
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
		case "commands":
			// Prints each attempt with the progress that earlier attempts reported, reports progress once, and then sleeps until
			// it is killed. The data EXIT, SILENT and PAUSED select other behavior.
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
				case "PAUSED": // reports progress until it is fenced
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
	begin := time.Now()
	if err == nil {
		err = svc.Start(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	if role == "idle" {
		fmt.Println(time.Since(begin).Microseconds())
	}
	if role == "senders" { // on a byte of input, sends one command 25 times concurrently and prints the results
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

// A proxy forwards connections from clients to a server. It can delay the data in either direction, or cut the connections.
type proxy struct {
	address string
	ended   chan struct{}

	mu     sync.Mutex // guards the rest
	held   map[way]chan struct{}
	conns  []net.Conn
	frozen net.Conn // a client's connection that forwards nothing any more
}

// freeze stops one connection for good: heal does not release it.
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

// hold delays all data in the given directions until heal.
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

// cut closes all connections. Delayed data is lost.
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
			t.Error("NotRun = false, want true")
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

func TestStopFinishesRequests(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	running, release := make(chan struct{}, 4), make(chan struct{})
	handle(t, svc, "m", func(ctx context.Context, n int) (string, error) {
		running <- struct{}{}
		<-release
		return aegis.Call[string, string](ctx, svc, "helper", "echo", strconv.Itoa(n)) // a stopping service may still make calls
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
	time.Sleep(50 * time.Millisecond) // lets the other two requests arrive
	stopped := make(chan error)
	go func() { stopped <- svc.Stop(context.Background()) }()
	eventually(t, "new calls are refused", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // a call that was still accepted waits until release
		defer cancel()
		_, err := aegis.Call[int, string](ctx, client, "svc", "m", 9)
		return errors.Is(err, aegis.ErrUnavailable)
	})
	select {
	case err := <-stopped:
		t.Fatalf("Stop returned %v while handlers were running", err)
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

func TestStopTimeout(t *testing.T) {
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
	time.Sleep(50 * time.Millisecond) // lets the other request arrive
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
					t.Error("NotRun = false, want true")
				}
				refused++
			}
		}
		if ran != 1 || refused != 1 {
			t.Errorf("%d ran and %d were refused, want 1 and 1", ran, refused)
		}
	})
}

// unreachable returns the address of a server that does not run yet, and a function that starts it.
func unreachable(tb testing.TB, configure ...func(*server.Options)) (url string, begin func() *server.Server) {
	port := freePort(tb)
	configure = append(configure, func(o *server.Options) { o.Port = port })
	return fmt.Sprint("nats://127.0.0.1:", port), func() *server.Server { return startServer(tb, configure...) }
}

// lateService returns a service whose server need not run when it is made.
func lateService(tb testing.TB, url, name string, opts ...nats.Option) *aegis.Service {
	tb.Helper()
	opts = append([]nats.Option{nats.RetryOnFailedConnect(true), nats.CustomReconnectDelay(func(int) time.Duration { return 10 * time.Millisecond })}, opts...)
	s, err := aegis.New(name, aegis.WithURL(url), aegis.WithLogger(slog.New(slog.DiscardHandler)), aegis.WithNATS(opts...))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = s.Stop(ctx)
	})
	return s
}

// A service that is not connected yet is not ready, and its Start waits for the connection.
func TestServerThatComesLater(t *testing.T) {
	t.Parallel()
	url, begin := unreachable(t, withJetStream(t))
	svc := lateService(t, url, "svc")
	handle(t, svc, "m", echo)
	var events journal[string]
	subscribe(t, svc, "a.b", into(&events))
	down := func() {
		t.Helper()
		if n := svc.Stats().Connected; n != 0 {
			t.Errorf("%d connections are up without a server", n)
		}
		if status, body := get(t, svc, "/readyz"); status != 503 {
			t.Errorf("/readyz answers %d %s", status, body)
		}
		if _, body := get(t, svc, "/metrics"); !strings.Contains(body, `aegis_connections{service="svc"} 0`) {
			t.Error("the metric aegis_connections is not 0")
		}
		promptly(t, func() {
			_, err := call[string, string](svc, "svc", "m", "hi")
			if e := fails(t, err, aegis.ErrUnavailable, "127.0.0.1"); !e.NotRun {
				t.Error("NotRun = false, want true")
			}
			fails(t, aegis.Publish(t.Context(), svc, "a", "b", "c", aegis.Retry(aegis.RetryPolicy{Attempts: 1})), aegis.ErrUnavailable)
		})
	}
	down()
	started := make(chan error)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() { started <- svc.Start(ctx) }()
	select {
	case err := <-started:
		t.Fatalf("Start returned %v without a server", err)
	case <-time.After(300 * time.Millisecond):
	}
	down()
	begin()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if status, body := get(t, svc, "/readyz"); status != 200 {
		t.Errorf("/readyz answers %d %s", status, body)
	}
	if n := svc.Stats().Connected; n != 2 {
		t.Errorf("%d connections are up, want 2", n)
	}
	if got, err := call[string, string](svc, "svc", "m", "hi"); got != "hi" || err != nil {
		t.Error(got, err)
	}
	publish(t, svc, "a", "b", "c")
	events.wait(t, 1)
}

// Start gives up on a server that does not come when its ctx ends, or when Stop is called.
func TestServerThatNeverComes(t *testing.T) {
	t.Parallel()
	url, _ := unreachable(t)
	svc := lateService(t, url, "svc")
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := svc.Start(ctx)
	fails(t, err, aegis.ErrUnavailable, "127.0.0.1")
	if took := time.Since(begin); took < 300*time.Millisecond || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Start returned %v after %v, want DEADLINE_EXCEEDED as its cause after 300ms", err, took)
	}

	svc = lateService(t, url, "svc")
	started := make(chan error)
	go func() { started <- svc.Start(t.Context()) }()
	time.Sleep(20 * time.Millisecond) // so that Start most likely waits
	promptly(t, func() {
		_ = svc.Stop(t.Context()) // says that the server can't be reached
		fails(t, <-started, aegis.ErrClosed)
	})

	svc = lateService(t, url, "svc")
	ctx, cancel = context.WithCancel(t.Context())
	go func() { started <- svc.Run(ctx) }()
	time.Sleep(20 * time.Millisecond)
	promptly(t, func() {
		cancel()
		if err := <-started; err != nil && !errors.Is(err, aegis.ErrUnavailable) {
			t.Errorf("Run returned %v", err)
		}
	})

	// The same if the server went away after New.
	srv := startServer(t)
	svc = newService(t, srv, "svc")
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "the service has lost its connections", func() bool { return svc.Stats().Connected == 0 })
	handle(t, svc, "m", echo)
	go func() { started <- svc.Start(t.Context()) }()
	time.Sleep(20 * time.Millisecond)
	startServer(t, samePort)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if got, err := call[string, string](svc, "svc", "m", "hi"); got != "hi" || err != nil {
		t.Error(got, err)
	}
}

// A connection that nats.go has given up, or that was closed by the user, ends the service.
func TestConnectionClosedForGood(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*server.Server, *aegis.Service){
		"gave up": func(srv *server.Server, _ *aegis.Service) { srv.Shutdown() },
		"closed":  func(_ *server.Server, s *aegis.Service) { s.Conn().Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t)
			svc := lateService(t, srv.ClientURL(), "svc", nats.MaxReconnects(2))
			handle(t, svc, "m", echo)
			ended := make(chan error)
			go func() { ended <- svc.Run(t.Context()) }()
			eventually(t, "the service is ready", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })
			if status, body := get(t, svc, "/healthz"); status != 200 {
				t.Errorf("/healthz answers %d %s", status, body)
			}
			end(srv, svc)
			select {
			case err := <-ended:
				fails(t, err, aegis.ErrUnavailable, "closed for good")
			case <-time.After(20 * time.Second):
				t.Fatal("Run goes on")
			}
			if status, body := get(t, svc, "/healthz"); status != 503 {
				t.Errorf("/healthz answers %d %s", status, body)
			}
		})
	}

	// A client without Run sees it in the probes, which don't recover.
	srv := startServer(t)
	client := lateService(t, srv.ClientURL(), "client", nats.MaxReconnects(2))
	samePort := onPort(srv)
	srv.Shutdown()
	eventually(t, "/healthz answers 503", func() bool { status, _ := get(t, client, "/healthz"); return status == 503 })
	srv.WaitForShutdown()
	startServer(t, samePort)
	if status, body := get(t, client, "/healthz"); status != 503 || !strings.Contains(body, "closed for good") {
		t.Errorf("/healthz answers %d %s", status, body)
	}
	promptly(t, func() {
		fails(t, client.Start(t.Context()), aegis.ErrUnavailable, "closed for good")
		_, err := call[string, string](client, "svc", "m", "hi")
		fails(t, err, aegis.ErrUnavailable)
	})

	// A Start that waits for a connection that is given up ends, too.
	url, _ := unreachable(t)
	late := lateService(t, url, "late", nats.MaxReconnects(2))
	fails(t, late.Start(t.Context()), aegis.ErrUnavailable, "closed for good")
}

// Stop in a handler, or in a function of Lead, would wait for itself.
func TestStopInHandler(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var svc, other *aegis.Service
	results := make(chan error, 10)
	stop := func(ctx context.Context) {
		results <- svc.Stop(context.Background())
		results <- svc.Stop(ctx)
	}
	expect := func(what string) {
		t.Helper()
		for range 2 {
			select {
			case err := <-results:
				fails(t, err, aegis.ErrInvalid, "Stop", "go")
			case <-time.After(10 * time.Second):
				t.Fatalf("Stop in %s hangs", what)
			}
		}
	}
	svc = newService(t, srv, "svc", aegis.WithMiddleware(func(next aegis.HandlerFunc) aegis.HandlerFunc {
		return func(ctx context.Context, m *aegis.Message) ([]byte, error) {
			if m.Header.Get("Stop") != "" {
				stop(ctx)
			}
			return next(ctx, m)
		}
	}))
	other = newService(t, srv, "other")
	handle(t, svc, "echo", echo)
	handle(t, svc, "stop", func(ctx context.Context, _ int) (int, error) { stop(ctx); return 0, nil })
	handle(t, svc, "helped", func(ctx context.Context, _ int) (int, error) {
		done := make(chan struct{})
		go func() { defer close(done); results <- svc.Stop(ctx) }() // waits for the handler by its ctx
		<-done
		results <- svc.Stop(ctx)
		return 0, nil
	})
	handle(t, svc, "other", func(ctx context.Context, _ int) (int, error) { return 0, other.Stop(context.Background()) })
	handle(t, svc, "shutdown", func(context.Context, int) (string, error) {
		go func() { results <- svc.Stop(context.Background()) }()
		return "bye", nil
	})
	subscribe(t, svc, "a.b", func(ctx context.Context, _ aegis.Event[int]) error { stop(ctx); return nil })
	handleCommand(t, svc, "work", func(ctx context.Context, _ *aegis.Command[int]) (int, error) { stop(ctx); return 0, nil })
	start(t, svc)
	client := newService(t, srv, "client")
	ctx := t.Context()
	for _, method := range []string{"stop", "helped"} {
		if _, err := call[int, int](client, "svc", method, 1); err != nil {
			t.Error(err)
		}
		expect(method)
	}
	if _, err := aegis.Call[string, string](aegis.WithHeader(ctx, "Stop", "1"), client, "svc", "echo", ""); err != nil {
		t.Error(err)
	}
	expect("middleware")
	publish(t, client, "a", "b", 1)
	expect("a handler of events")
	wait(t, send[int, int](t, client, "svc", "work", 1))
	expect("a handler of commands")
	leading, cancel := context.WithCancel(ctx)
	go func() {
		_ = svc.Lead(leading, "group", aegis.Aggressive, func(ctx context.Context, _ uint64) error { stop(ctx); return nil })
	}()
	expect("the function of Lead")
	cancel()
	if _, err := call[int, int](client, "svc", "other", 1); err != nil {
		t.Errorf("Stop of another service failed: %v", err)
	}
	if got, err := call[int, string](client, "svc", "shutdown", 1); got != "bye" || err != nil {
		t.Error(got, err)
	}
	if err := <-results; err != nil {
		t.Errorf("Stop on another goroutine returned %v", err)
	}
}

// When the ctx of any Stop has ended and that Stop has returned, the connections are closed.
func TestSecondStopWithLessTime(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "svc")
	inside, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "hang", func(context.Context, int) (int, error) {
		close(inside)
		<-release
		return 0, nil
	})
	start(t, svc)
	defer close(release)
	client := newService(t, srv, "client")
	go func() { _, _ = call[int, int](client, "svc", "hang", 1) }()
	<-inside
	first := make(chan error)
	go func() { first <- svc.Stop(context.Background()) }()
	eventually(t, "the first Stop has begun", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	fails(t, svc.Stop(ctx), aegis.ErrTimeout)
	if !svc.Conn().IsClosed() {
		t.Error("the connection is open after Stop")
	}
	if took := time.Since(begin); took < 200*time.Millisecond || took > 3*time.Second {
		t.Errorf("the second Stop took %v, want its 200ms and a little more", took)
	}
	fails(t, <-first, aegis.ErrTimeout, "1 handlers running")
	ended, cancelNow := context.WithCancel(t.Context())
	cancelNow()
	if err := svc.Stop(ended); err != nil {
		t.Errorf("Stop of a stopped service returned %v", err)
	}
}

// Start returns the errors of registrations that nobody has checked.
func TestStartReturnsFailedRegistrations(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc"), newService(t, srv, "client")
	noEvent := func(context.Context, aegis.Event[int]) error { return nil }
	noCommand := func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil }
	handle(t, svc, "good", echo)
	_ = aegis.Handle(svc, "good", echo)
	_ = aegis.Handle(svc, "create-order", echo)
	_ = aegis.Handle[int, int](svc, "none", nil)
	_ = aegis.Handle(svc, "few", echo, aegis.Concurrency(0))
	_ = aegis.Handle(svc, "durable", echo, aegis.Durable("x"))
	_ = aegis.Subscribe(svc, "a..b", noEvent)
	_ = aegis.Subscribe[int](svc, "a.none", nil)
	_ = aegis.Subscribe(svc, "a.b", noEvent, aegis.Attempts(-1))
	_ = aegis.HandleCommand(svc, "re-balance", noCommand)
	_ = aegis.HandleCommand[int, int](svc, "work", nil)
	_ = aegis.HandleCommand(svc, "work", noCommand, aegis.FromStart())
	err := svc.Start(t.Context())
	fails(t, err, aegis.ErrInvalid, `"good"`, `"create-order"`, `"none"`, "Concurrency(0)", `Durable("x")`, `"a..b"`, `"a.none"`, "Attempts(-1)",
		`"re-balance"`, `"work": the function is nil`, "FromStart()")
	_, err = call[string, string](client, "svc", "good", "hi")
	fails(t, err, aegis.ErrUnavailable)

	svc = newService(t, srv, "svc")
	start(t, svc)
	fails(t, aegis.Handle(svc, "create-order", echo), aegis.ErrInvalid)
	handle(t, svc, "good", echo)
	if got, err := call[string, string](client, "svc", "good", "hi"); got != "hi" || err != nil {
		t.Error(got, err)
	}
}

func TestWithStopTimeout(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	for _, d := range []time.Duration{0, -time.Second} {
		_, err := aegis.New("svc", aegis.WithURL(srv.ClientURL()), aegis.WithStopTimeout(d))
		fails(t, err, aegis.ErrInvalid, "WithStopTimeout")
	}
	svc, client := newService(t, srv, "svc", aegis.WithStopTimeout(300*time.Millisecond)), newService(t, srv, "client")
	inside, release := make(chan struct{}), make(chan struct{})
	handle(t, svc, "hang", func(context.Context, int) (int, error) {
		close(inside)
		<-release
		return 0, nil
	})
	defer close(release)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- svc.Run(ctx) }()
	eventually(t, "the service is ready", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })
	go func() { _, _ = call[int, int](client, "svc", "hang", 1) }()
	<-inside
	begin := time.Now()
	cancel()
	fails(t, <-ended, aegis.ErrTimeout)
	if took := time.Since(begin); took < 300*time.Millisecond || took > 3*time.Second {
		t.Errorf("Run ended after %v, want 300ms and a little more", took)
	}
}

func TestStopWhileDisconnected(t *testing.T) {
	t.Parallel()
	srv := startServer(t)
	svc := newService(t, srv, "svc")
	handle(t, svc, "m", echo)
	start(t, svc)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "the service notices the lost connection", func() bool { return !svc.Conn().IsConnected() })
	promptly(t, func() {
		fails(t, svc.Stop(context.Background()), aegis.ErrUnavailable)
		if err := svc.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		_, err := call[string, string](svc, "svc", "m", "")
		fails(t, err, aegis.ErrClosed)
	})
}

// If one connection is down, Stop still finishes the requests that arrived over the others.
func TestStopWithOneConnectionDown(t *testing.T) {
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
	clients := func(n int) func() bool { return func() bool { return srv.NumClients() == n } }
	eventually(t, "all connections are up", clients(6))
	time.Sleep(20 * time.Millisecond)
	stop()
	id, err := svc.Conn().GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.DisconnectClientByID(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one connection is down", clients(5))
	stop = hammer(t, client, 16, "svc", "m", func(err error) { t.Error(err) })
	time.Sleep(20 * time.Millisecond)
	fails(t, svc.Stop(t.Context()), aegis.ErrUnavailable)
	if stop() == 0 {
		t.Error("no call succeeded")
	}
}

// allowances returns the subjects in a row of the README's table of permissions, and in the rows that it includes ("+ service").
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
		sure, _, _ := strings.Cut(cells[2], ";") // only some operations need the subjects after the semicolon
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
	tb.Fatalf("the README's table of permissions has no row %q", who)
	return nil, nil
}

// A denied subscription to a subject must not fail a call in flight to the same subject.
func TestDeniedSubscriptionDoesNotFailCall(t *testing.T) {
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

// TestPermissions gives each role exactly the permissions that the README lists, which must suffice. Then it removes one subject
// at a time, which must fail with an error that names that subject. So the README lists no subject that is not needed.
func TestPermissions(t *testing.T) {
	t.Parallel()
	type env struct {
		*testing.T
		srv   *server.Server
		admin *aegis.Service // may do anything
		user  aegis.Option
	}
	waitUntil := func(e env, ctx context.Context, what string, ok func() bool) error {
		for !ok() {
			if ctx.Err() != nil {
				return fmt.Errorf("timed out waiting until %s", what)
			}
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	startUser := func(e env, ctx context.Context, prepare func(s *aegis.Service) error) (*aegis.Service, error) {
		s := newService(e, e.srv, "orders", e.user, aegis.WithFailover(aegis.Aggressive))
		if err := prepare(s); err != nil {
			return nil, err
		}
		return s, s.Start(ctx)
	}
	startTarget := func(e env) *aegis.Service { // the service that callers use
		s := newService(e, e.srv, "orders", aegis.WithNATS(nats.UserInfo("admin", "")), aegis.WithFailover(aegis.Aggressive))
		handle(e, s, "create", echo)
		handleCommand(e, s, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
			time.Sleep(200 * time.Millisecond) // lets the sender learn of a denied subscription before the result is there
			return c.Data, nil
		})
		start(e, s)
		return s
	}
	for who, exercise := range map[string]func(e env, ctx context.Context) error{
		"service": func(e env, ctx context.Context) error {
			if _, err := startUser(e, ctx, func(s *aegis.Service) error { return aegis.Handle(s, "create", echo) }); err != nil {
				return err
			}
			_, err := aegis.Call[string, string](ctx, e.admin, "orders", "create", "x")
			return err
		},
		"it subscribes": func(e env, ctx context.Context) error {
			var got journal[int]
			failed := false
			_, err := startUser(e, ctx, func(s *aegis.Service) error {
				return aegis.Subscribe(s, "order.*", func(_ context.Context, ev aegis.Event[int]) error {
					if got.add(ev.Data); ev.Data == 2 && !failed {
						failed = true
						return errors.New("store this as a dead letter")
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
			return waitUntil(e, ctx, "all events are delivered", func() bool { return slices.Equal(got.all(), []int{1, 2, 3}) })
		},
		"it handles commands": func(e env, ctx context.Context) error {
			_, err := startUser(e, ctx, func(s *aegis.Service) error {
				return aegis.HandleCommand(s, "work", func(_ context.Context, c *aegis.Command[string]) (string, error) {
					if c.Data == "fail" {
						return "", errors.New("store this as a dead letter")
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
			s, err := startUser(e, ctx, func(s *aegis.Service) error { return aegis.Handle(s, "create", echo, aegis.Exclusive()) })
			if err != nil {
				return err
			}
			if _, err := s.Leader(ctx); err != nil && !errors.Is(err, aegis.ErrNotFound) {
				return err
			}
			return waitUntil(e, ctx, "the instance leads", s.IsLeader)
		},
		"caller": func(e env, ctx context.Context) error {
			startTarget(e)
			_, err := aegis.Call[string, string](ctx, newService(e, e.srv, "shop", e.user), "orders", "create", "x")
			return err
		},
		"it discovers": func(e env, ctx context.Context) error {
			startTarget(e)
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
		"it sends events for later": func(e env, ctx context.Context) error {
			s := newService(e, e.srv, "shop", e.user)
			err := aegis.Publish(ctx, s, "order", "created", 1, aegis.After(time.Hour))
			if err == nil {
				err = aegis.Publish(ctx, s, "order", "created", 1)
			}
			return err
		},
		"it schedules them": func(e env, ctx context.Context) error {
			startTarget(e)
			shop := newService(e, e.srv, "shop", e.user)
			var err error
			for _, opts := range [][]aegis.CallOption{nil, {aegis.After(100 * time.Millisecond)}} {
				var j *aegis.Job[string]
				if err == nil {
					j, err = aegis.SendCommand[string, string](ctx, shop, "orders", "work", "x", opts...)
				}
				if err == nil {
					_, err = j.Wait(ctx)
				}
			}
			if err == nil {
				err = aegis.ScheduleCommand(ctx, shop, "daily", "@daily", "orders", "work", "x")
			}
			if err == nil {
				err = shop.Unschedule(ctx, "orders", "work", "daily")
			}
			return err
		},
		"it sends commands": func(e env, ctx context.Context) error {
			startTarget(e)
			shop := newService(e, e.srv, "shop", e.user)
			j, err := aegis.SendCommand[string, string](ctx, shop, "orders", "work", "x")
			if err == nil {
				_, err = j.Wait(ctx)
			}
			return err
		},
		"an operator": func(e env, ctx context.Context) error {
			s := startTarget(e)
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
			for len(letters) > 0 { // those that failed again
				for d, err := range operator.DeadLetters(ctx) {
					if err == nil {
						err = operator.Discard(ctx, d)
					}
					if err != nil {
						return err
					}
					delete(letters, d.Subject)
				}
			}
			for _, err := range operator.Commands(ctx, "orders") {
				if err != nil {
					return err
				}
			}
			for _, err := range operator.Schedules(ctx) {
				return err
			}
			return nil
		},
	} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			publish, subscribe := allowances(t, who)
			exerciseWithout := func(t *testing.T, missing string) error {
				p, s := slices.DeleteFunc(slices.Clone(publish), func(x string) bool { return x == missing }), slices.DeleteFunc(slices.Clone(subscribe), func(x string) bool { return x == missing })
				// "none" keeps the lists from being empty, because an empty list allows everything.
				permissions := &server.Permissions{Publish: &server.SubjectPermission{Allow: append(p, "none")}, Subscribe: &server.SubjectPermission{Allow: append(s, "none")}}
				if who == "service" || strings.HasPrefix(who, "it ") && slices.Contains(publish, "service.orders.*") {
					permissions.Response = &server.ResponsePermission{MaxMsgs: server.DEFAULT_ALLOW_RESPONSE_MAX_MSGS, Expires: server.DEFAULT_ALLOW_RESPONSE_EXPIRATION}
				}
				srv := startServer(t, withJetStream(t), func(o *server.Options) {
					o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: permissions}}
				})
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				admin := newService(t, srv, "admin", aegis.WithNATS(nats.UserInfo("admin", "")))
				handle(t, admin, "m", echo, aegis.Exclusive()) // creates the streams and buckets
				handleCommand(t, admin, "m", func(context.Context, *aegis.Command[int]) (int, error) { return 0, nil })
				start(t, admin)
				if err := aegis.Publish(ctx, admin, "x", "y", 1); err != nil {
					t.Fatal(err)
				}
				return exercise(env{t, srv, admin, aegis.WithNATS(nats.UserInfo("user", ""))}, ctx)
			}
			if err := exerciseWithout(t, ""); err != nil {
				t.Fatal("the permissions in the README do not suffice:", err)
			}
			for _, missing := range slices.Concat(publish, subscribe) {
				t.Run(missing, func(t *testing.T) {
					t.Parallel()
					err := exerciseWithout(t, missing)
					if e := fails(t, err, aegis.ErrDenied); !strings.Contains(e.Message, strings.TrimRight(missing, ">*")) {
						t.Errorf("the error doesn't name %s: %v", missing, e)
					}
				})
			}
		})
	}
}

// Stop does not wait if it has no permission to delete the consumer of a broadcast. The server removes that consumer when it
// expires.
func TestStopWithoutPermissionToDelete(t *testing.T) {
	t.Parallel()
	publish, subscribe := allowances(t, "it subscribes")
	permissions := &server.Permissions{Publish: &server.SubjectPermission{Allow: publish}, Subscribe: &server.SubjectPermission{Allow: subscribe}}
	srv := startServer(t, withJetStream(t), func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: permissions}}
	})
	admin := newService(t, srv, "admin", aegis.WithNATS(nats.UserInfo("admin", "")))
	if err := aegis.Subscribe(admin, "x.y", into(&journal[int]{})); err != nil { // creates the streams
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
		t.Errorf("Stop took %v, want at most 500 ms", d)
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
		t.Errorf("the connection is not encrypted: %v", err)
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

// handleAll adds the handlers of a child in the role "soak". They print each handled event, and the term and time of each
// exclusive call.
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
			_ = c.Progress(50, "half") // the error doesn't matter: if the command was canceled or taken over, its result does not count
			time.Sleep(5 * time.Millisecond)
			return fmt.Sprint(c.Data, " by ", svc.ID(), " ", c.Attempt), nil
		}, aegis.Attempts(100)),
	)
}

// TestSoak puts three instances under all kinds of load while connections are cut, an instance is killed, one is paused, one is
// stopped and the server is restarted. With -full, it repeats this for three minutes. No acknowledged event may be lost, each
// command must have one outcome, no two terms may serve exclusive calls at the same time, and each call must get an answer or an
// error in time.
func TestSoak(t *testing.T) { // not parallel, because it uses the whole machine
	store := withJetStream(t)
	srv := startServer(t, store)
	port := onPort(srv)
	p := startProxy(t, srv)
	events := map[int]int{} // how often each event was handled
	var exclusive []reignOf
	var mu sync.Mutex // guards events and exclusive
	startInstance := func() *process {
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
			t.Fatal("the child was not ready after 30 s")
		}
		return child
	}
	stop := func(child *process) {
		_ = child.input.Close()
		for range child.told {
		}
	}
	stop(startInstance()) // creates the streams and consumers
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
	// The consumer of a watch disappears a moment later, so it is left out.
	durable := slices.DeleteFunc(consumers(), func(name string) bool { return !strings.HasPrefix(name, "risk~") })
	idle := srv.NumSubscriptions()
	instances := []*process{startInstance(), startInstance(), startInstance()}
	quick := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	client := newService(t, srv, "shop", quick)

	// Three goroutines per kind produce the load, and count the successes.
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
						t.Errorf("%s: returned %v after %v, allowed %v", kind, err, took, allowed)
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
	run("call", time.Second, answered("echo")) // a third of the calls go to the instance that is paused
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
	waitForProgress := func(after string) {
		t.Helper()
		for kind, n := range progress {
			was := n.Load()
			eventually(t, "more "+kind+" requests succeed after "+after, func() bool { return n.Load() > was+3 })
		}
	}
	waitForProgress("the start")
	for end := time.Now().Add(3 * time.Minute); ; {
		p.cut()
		waitForProgress("all connections were cut")
		if err := instances[0].Process.Kill(); err != nil {
			t.Fatal(err)
		}
		instances[0] = startInstance()
		waitForProgress("an instance was killed")
		if err := instances[1].Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second) // longer than its lease
		waitForProgress("an instance was paused")
		if err := instances[1].Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		waitForProgress("the paused instance continued")
		stop(instances[2])
		instances[2] = startInstance()
		waitForProgress("an instance was stopped")
		srv.Shutdown()
		srv.WaitForShutdown()
		srv = startServer(t, port, store)
		waitForProgress("the server was restarted")
		if !*full || time.Now().After(end) {
			break
		}
	}
	close(done)
	load.Wait()

	// Everything that was acknowledged has been done.
	eventually(t, "all events are handled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return !slices.ContainsFunc(stored.all(), func(n int) bool { return events[n] == 0 })
	})
	outcomes := map[string]string{}
	for range 2 { // both rounds must return the same results
		for _, key := range jobs.all() {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			result, err := aegis.Attach[string](client, "risk", "work", key).Wait(ctx)
			cancel()
			if err != nil || !strings.HasPrefix(result, strings.TrimPrefix(key, "job-")+" by ") || outcomes[key] != "" && outcomes[key] != result {
				t.Errorf("%s: got %q, %v; the first round returned %q", key, result, err, outcomes[key])
			}
			outcomes[key] = result
		}
	}
	letters := 0
	for d, err := range client.DeadLetters(t.Context()) {
		letters++
		t.Errorf("unexpected dead letter: %s %v", d.Reason, err)
	}
	t.Logf("%d calls, %d exclusive, %d events, %d commands; %d dead letters", progress["call"].Load(), progress["exclusive"].Load(), len(stored.all()), len(outcomes), letters)
	mu.Lock()
	slices.SortFunc(exclusive, func(a, b reignOf) int { return cmp.Compare(a.from, b.from) })
	latest := reignOf{}
	for _, r := range exclusive {
		if r.from < latest.to && r.term != latest.term || r.term < latest.term {
			t.Errorf("term %d of %s served while term %d of %s served", r.term, r.who, latest.term, latest.who)
		}
		if r.to > latest.to {
			latest = r
		}
	}
	mu.Unlock()

	// No consumers or subscriptions are left behind.
	for _, child := range instances {
		stop(child)
	}
	if err := client.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	// The server removes consumers with a delay.
	for end := time.Now().Add(time.Minute); !slices.Equal(consumers(), durable); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("got consumers %v, want those of the start: %v", consumers(), durable)
		}
	}
	eventually(t, fmt.Sprint("there are no more subscriptions than ", idle), func() bool { return srv.NumSubscriptions() <= idle })
}

// A client that may publish can send any data to any subject. This must not crash an instance, exhaust its memory, or keep it
// from its work.
func TestHostileInput(t *testing.T) { // not parallel, because it uses the whole machine
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
	// The connection receives more than it reads, and ignores the errors about that.
	nc, err := nats.Connect(srv.ClientURL(), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
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
		"events.order.created", "events.$redrive.risk~order~+.7", "commands.risk.work", "commands.risk.work.critical",
		"$KV.aegis_registry.risk.x", "$KV.aegis_registry.risk.x.y", "$KV.aegis_commands.risk.work.x", "aegis.jobs.risk.work.x", "service.risk.register",
	}
	// Some messages are unsolicited replies to calls, both calls that wait for an answer and calls that have ended. A
	// subscription overhears the reply subjects. The caller whose replies are overheard may take an unsolicited reply for its
	// answer if that reply comes first. The other callers must not notice anything.
	victim := newService(t, srv, "victim")
	stopVictim := hammer(t, victim, 2, "risk", "echo", func(error) {})
	overheard := make(chan *nats.Msg, 64)
	eavesdropping, err := nc.ChanSubscribe("_INBOX.victim.>", overheard)
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
		case heard := <-overheard: // from this loop, or an answer of the service to the victim
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
	stopVictim()
	if calls := stop(); calls < 100 {
		t.Errorf("only %d calls succeeded, want at least 100", calls)
	}
	if err := eavesdropping.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	for len(overheard) > 0 {
		<-overheard
	}
	publish(t, client, "order", "created", Order{Qty: 4711})
	eventually(t, "the event is delivered", func() bool { return slices.Contains(got.all(), 4711) })
	if r := wait(t, send[Order, int](t, client, "risk", "work", Order{Qty: 7})); r != 7 {
		t.Error(r)
	}
	eventually(t, "Discover returns the instance", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	eventually(t, "memory use is at most 64 MB above what it was before", func() bool { return heap() < before+64<<20 })
	t.Logf("%d messages sent, memory grew by %d MB", sent, (int64(heap())-int64(before))>>20)
}

// Callers offer three times as much load as a service can handle. The service must keep up its throughput and reject the rest at
// once, whether its handlers wait or use all of the CPU. A bad result is measured again, at most twice, because something else
// may keep the machine busy.
func TestGoodputUnderOverload(t *testing.T) { // not parallel, because other tests would distort it
	var sink atomic.Uint64
	compute := func() { // takes about 10 ms, also with -race
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
		quick       time.Duration // within which a call must be rejected
	}{
		{"waiting", func() { time.Sleep(20 * time.Millisecond) }, 8, 200 * time.Millisecond},
		{"computing", compute, runtime.GOMAXPROCS(0), time.Second}, // each of a dozen hops waits 10 ms or more for its slice of the CPU
	} {
		t.Run(c.name, func(t *testing.T) {
			for round := 1; ; round++ {
				goodput, took := measureOverload(t, c.work, c.concurrency)
				if goodput >= 0.8 && took < c.quick {
					return
				}
				if round == 3 {
					t.Fatalf("goodput is %.2f of capacity, want 0.8; a rejection took up to %v, want less than %v", goodput, took, c.quick)
				}
			}
		})
	}
}

// measureOverload offers a service three times the load that it can handle. It returns the throughput as a fraction of the
// service's capacity, and the longest time that a rejection took.
func measureOverload(t *testing.T, work func(), concurrency int) (goodput float64, took time.Duration) {
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
	var done, refused, slowest atomic.Int64 // slowest is the time of the slowest rejection in ns
	callOnce := func() {
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
	for range concurrency + max(concurrency/2, 1) { // some requests run, and some wait
		callers.Go(func() {
			for time.Since(begin) < phase {
				callOnce()
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
	for time.Since(begin) < phase { // offers load at a fixed rate, without waiting for answers
		for due := int(3 * capacity * time.Since(begin).Seconds()); offered < due; offered++ {
			callers.Go(callOnce)
		}
		time.Sleep(time.Millisecond)
	}
	goodput = float64(done.Load()) / time.Since(begin).Seconds() / capacity
	more := heap() - before
	callers.Wait()
	took = time.Duration(slowest.Load())
	t.Logf("capacity %.0f/s, offered %.0f/s, goodput %.2f of capacity, %d rejected, the slowest after %v, memory grew by %d kB",
		capacity, float64(offered)/phase.Seconds(), goodput, refused.Load(), took, more>>10)
	if int(done.Load()+refused.Load()) != offered || refused.Load() < int64(offered)/3 {
		t.Errorf("%d done and %d rejected of %d offered", done.Load(), refused.Load(), offered)
	}
	if more > 16<<20 {
		t.Errorf("memory grew by %d MB, want at most 16", more>>20)
	}
	return goodput, took
}
