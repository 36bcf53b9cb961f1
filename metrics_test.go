package aegis_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

// endpointStats returns the statistics of one endpoint of s. It fails the test if there is no such endpoint.
func endpointStats(tb testing.TB, s *aegis.Service, kind, name string) aegis.EndpointStats {
	tb.Helper()
	for _, e := range s.Stats().Endpoints {
		if e.Kind == kind && e.Name == name {
			return e
		}
	}
	tb.Fatalf("no statistics of the %s endpoint %s in %+v", kind, name, s.Stats().Endpoints)
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
		t.Errorf("the statistics before Start are wrong: %+v", got)
	}
	start(t, svc)
	for what, n := range map[string]int{"ok": 95, "slow": 5, "refuse": 3, "panic": 2} {
		for range n {
			if _, err := call[string, string](shop, "svc", "m", what); (err == nil) != (what == "ok" || what == "slow") {
				t.Fatalf("the call %q returned %v", what, err)
			}
		}
	}
	if _, err := call[int, string](web, "svc", "m", 1); err == nil {
		t.Error("a call with a number succeeded; want an error, because the handler takes a string")
	}
	if _, err := call[string, string](web, "svc", "nothing", ""); err == nil {
		t.Error("a call of an unknown method succeeded")
	}
	// A request is counted before it is answered, so there is no need to wait.
	m := endpointStats(t, svc, "rpc", "m")
	if m.Requests != 106 || m.Errors != 6 || !reflect.DeepEqual(m.Codes, map[string]uint64{"NO_FUNDS": 3, "INTERNAL": 2, "INVALID_ARGUMENT": 1}) ||
		!reflect.DeepEqual(m.Callers, map[string]uint64{"shop": 105, "web": 1}) || m.InFlight != 0 || m.Pending != 0 || m.Shed != 0 || m.Expired != 0 {
		t.Errorf("the statistics of the handler m are wrong: %+v", m)
	}
	if m.P50 <= 0 || m.P50 > 15*time.Millisecond || m.P90 < m.P50 || m.P99 < 19*time.Millisecond || m.P99 > m.Max || m.Max < 20*time.Millisecond || m.Max > 5*time.Second {
		t.Errorf("the latencies P50 %v, P90 %v, P99 %v, Max %v are out of range", m.P50, m.P90, m.P99, m.Max)
	}
	c := endpointStats(t, shop, "call", "svc.m")
	if c.Requests != 105 || c.Errors != 5 || c.Codes["NO_FUNDS"] != 3 || c.P99 < 19*time.Millisecond || c.InFlight != 0 {
		t.Errorf("the caller's statistics of svc.m are wrong: %+v", c)
	}
	if c := endpointStats(t, web, "call", "svc.nothing"); c.Requests != 1 || c.Codes["UNIMPLEMENTED"] != 1 {
		t.Errorf("the caller's statistics of svc.nothing are wrong: %+v", c)
	}

	// One call runs, a second one waits until its deadline, and a third one is rejected.
	first := make(chan error, 1)
	go func() { _, err := call[string, string](shop, "svc", "blocked", ""); first <- err }()
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	second := make(chan error, 1)
	go func() { _, err := aegis.Call[string, string](ctx, shop, "svc", "blocked", ""); second <- err }()
	eventually(t, "the second call waits", func() bool { return endpointStats(t, svc, "rpc", "blocked").Pending == 1 })
	eventually(t, "load shedding has begun", func() bool {
		_, err := call[string, string](shop, "svc", "blocked", "")
		return errors.Is(err, aegis.ErrOverloaded)
	})
	if b, c := endpointStats(t, svc, "rpc", "blocked"), endpointStats(t, shop, "call", "svc.blocked"); b.InFlight != 1 || b.Shed != 1 || b.Codes["OVERLOADED"] != 1 || c.InFlight != 2 {
		t.Errorf("with one call running and one waiting, the statistics are wrong: %+v\n%+v", b, c)
	}
	fails(t, <-second, aegis.ErrTimeout)
	time.Sleep(50 * time.Millisecond) // because the time of arrival is known only to a few milliseconds
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	eventually(t, "the expired request is dropped", func() bool { return endpointStats(t, svc, "rpc", "blocked").Expired == 1 })
	if b := endpointStats(t, svc, "rpc", "blocked"); b.Requests != 3 || b.Errors != 2 || b.InFlight != 0 || b.Pending != 0 || b.Callers["shop"] != 3 {
		t.Errorf("the statistics of the handler blocked are wrong: %+v", b)
	}

	st := svc.Stats()
	if st.Service != "svc" || st.Instance != svc.ID() || st.Version != "1.2.3" || st.Uptime <= 0 || st.Uptime > time.Minute || st.Connected != 3 || st.Reconnects != 0 || len(st.Leading) > 0 {
		t.Errorf("the statistics of the service are wrong: %+v", st)
	}
	if err := svc.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := svc.Stats(); st.Connected != 0 || len(st.Endpoints) != 2 { // the endpoints stay visible
		t.Errorf("the statistics after Stop are wrong: %+v", st)
	}
}

// TestStatsCountFailuresOutsideHandler checks that a request that fails after the handler has returned, or before it is called,
// counts as an error on both sides.
func TestStatsCountFailuresOutsideHandler(t *testing.T) {
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
			t.Errorf("the call %q succeeded", what)
		}
	}
	want := map[string]uint64{"INTERNAL": 2, "A?": 2}
	m, c := endpointStats(t, svc, "rpc", "m"), endpointStats(t, shop, "call", "svc.m")
	if !reflect.DeepEqual(m.Codes, want) || !reflect.DeepEqual(c.Codes, want) || m.Requests != 4 || m.Errors != 4 || c.Errors != 4 {
		t.Errorf("the statistics of the handler m and of its caller are wrong: %+v\n%+v", m, c)
	}
	handle(t, svc, "text", echo)
	if _, err := call[string, int](shop, "svc", "text", "x"); err == nil {
		t.Error("decoding a text as a number succeeded")
	}
	if c := endpointStats(t, shop, "call", "svc.text"); c.Codes["INTERNAL"] != 1 {
		t.Errorf("the caller's statistics of svc.text are wrong: %+v", c)
	}
	fails(t, waitError(t, send[int, string](t, shop, "svc", "work", 0)), aegis.ErrInternal, "max_payload")
	j := send[int, string](t, shop, "svc", "work", 1)
	eventually(t, "the command runs", func() bool { return endpointStats(t, svc, "command", "work").InFlight == 1 })
	if err := j.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the command has ended", func() bool { return endpointStats(t, svc, "command", "work").InFlight == 0 })
	if w := endpointStats(t, svc, "command", "work"); !reflect.DeepEqual(w.Codes, map[string]uint64{"INTERNAL": 1, "CANCELED": 1}) || w.Requests != 2 || w.DeadLetters != 1 {
		t.Errorf("the statistics of the command work are wrong: %+v", w)
	}
	// The large errors are truncated, so that the service's statistics still fit into a message.
	deps, err := shop.Dependencies(t.Context())
	if err != nil || len(deps) != 3 || deps[0].Errors != 4 {
		t.Errorf("Dependencies returned %+v, %v; want 3 dependencies, the first with 4 errors", deps, err)
	}
}

// TestStatsAreBounded checks that the statistics stay small. Instances, callers and error codes come from other processes, so
// there may be any number of them.
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
			t.Errorf("the statistics contain a code of %d bytes; want at most 64", len(code))
		}
	}
	for _, n := range m.Callers {
		callers += n
	}
	if len(m.Codes) > 65 || len(m.Callers) > 257 || m.Codes["OTHERS"] == 0 || m.Callers["OTHERS"] == 0 || codes != n || callers != n || m.Requests != n {
		t.Errorf("got %d codes with %d errors, %d callers with %d requests, %d requests in all", len(m.Codes), codes, len(m.Callers), callers, m.Requests)
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
	eventually(t, "four events and four commands wait", func() bool {
		e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
		return e.Pending == 4 && c.Pending == 4 && e.InFlight == 1 && c.InFlight == 1
	})
	close(release)
	for _, j := range jobs {
		wait(t, j)
	}
	eventually(t, "all events and commands are handled", func() bool {
		e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
		return e.Requests == 6 && c.Requests == 5 && e.Pending == 0 && c.Pending == 0 && e.InFlight == 0
	})
	e, c := endpointStats(t, svc, "event", "order.*"), endpointStats(t, svc, "command", "work")
	if e.Errors != 1 || e.Codes["INTERNAL"] != 1 || e.Callers["shop"] != 6 || e.Max <= 0 || c.Errors != 0 || c.Callers["shop"] != 5 {
		t.Errorf("the statistics of the events and commands are wrong: %+v\n%+v", e, c)
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
	eventually(t, "the instance leads", svc.IsLeader)
	if l := svc.Stats().Leading; len(l) != 2 || l["reaper"] != term || l["default"] == 0 {
		t.Errorf("Leading is %v; want reaper in term %d, and default", l, term)
	}
	cancel()
	<-ended
	if l := svc.Stats().Leading; len(l) != 1 {
		t.Errorf("Leading is %v after Lead has ended; want only default", l)
	}

	if _, err := call[string, string](svc, "svc", "m", "x"); err != nil {
		t.Fatal(err)
	}
	if b := svc.Stats().Breakers; !reflect.DeepEqual(b, map[string]string{"svc": "closed"}) {
		t.Errorf("the circuit breakers are %v; want svc closed", b)
	}
	_, err := call[int, int](svc, "other", "m", 1)
	fails(t, err, aegis.ErrUnavailable)
	if b := svc.Stats().Breakers; !reflect.DeepEqual(b, map[string]string{"svc": "closed", "other": "open"}) {
		t.Errorf("the circuit breakers are %v; want svc closed and other open", b)
	}
	eventually(t, "the circuit breaker of other is half-open", func() bool { return svc.Stats().Breakers["other"] == "half-open" })

	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "both connections are lost", func() bool { return svc.Stats().Connected == 0 })
	startServer(t, samePort, withJetStream(t))
	eventually(t, "both connections are back", func() bool { st := svc.Stats(); return st.Connected == 2 && st.Reconnects == 2 })
}

// get sends a GET request to the HTTP handler of s.
func get(tb testing.TB, s *aegis.Service, path string) (status int, body string) {
	tb.Helper()
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

// TestMetrics parses /metrics as Prometheus does. If $AEGIS_METRICS is set, it also writes the text to the file of that name, so
// that CI can check it with Prometheus's own linter (see .ci/run).
func TestMetrics(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "svc", aegis.WithFailover(aegis.Aggressive), aegis.WithBreaker(aegis.BreakerPolicy{}))
	handle(t, svc, "m", func(_ context.Context, what string) (string, error) {
		if what != "" {
			return "", &aegis.Error{Code: what}
		}
		time.Sleep(300 * time.Millisecond)
		return "", nil
	})
	handle(t, svc, "alone", echo, aegis.Exclusive())
	subscribe(t, svc, "order.*", func(context.Context, aegis.Event[int]) error { return nil })
	start(t, svc)
	eventually(t, "the instance leads", svc.IsLeader)
	const oddCode = "a\"b\\c\nd\xff"
	for _, what := range []string{"", "", "", "NO_FUNDS", oddCode} {
		_, _ = call[string, string](svc, "svc", "m", what)
	}
	publish(t, svc, "order", "created", 1)
	eventually(t, "the event is handled", func() bool {
		e := endpointStats(t, svc, "event", "order.*")
		return e.Requests == 1 && e.Pending == 0
	})
	status, text := get(t, svc, "/metrics")
	if status != http.StatusOK {
		t.Fatalf("/metrics answers %d", status)
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
				t.Errorf("%s has two HELP lines or an empty one", name)
			}
			described[name] = true
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if kinds[name] = kind; name != family {
				t.Errorf("the TYPE line of %s follows the HELP line of %s", name, family)
			}
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil || !utf8.ValidString(line) || !strings.HasPrefix(line, family) || !strings.Contains(line, `{service="svc"`) {
			t.Errorf("the line is not a valid sample of %s: %q", family, line)
		}
		if _, twice := samples[line[:i]]; twice {
			t.Errorf("the sample occurs twice: %s", line)
		}
		samples[line[:i]] = value
	}
	for name, kind := range map[string]string{
		"aegis_requests_total": "counter", "aegis_request_duration_seconds": "histogram", "aegis_in_flight": "gauge", "aegis_pending": "gauge",
		"aegis_shed_total": "counter", "aegis_expired_total": "counter", "aegis_connections": "gauge", "aegis_reconnects_total": "counter",
		"aegis_breaker_open": "gauge", "aegis_leader": "gauge", "aegis_uptime_seconds": "gauge",
	} {
		if kinds[name] != kind || !described[name] {
			t.Errorf("%s is a %q or has no HELP line; want a %s with one", name, kinds[name], kind)
		}
	}
	for sample, want := range map[string]float64{
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code=""}`:                    3,
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code="NO_FUNDS"}`:            1,
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code="a\"b\\c\nd?"}`:         1,
		`aegis_requests_total{service="svc",kind="rpc",endpoint="m",code="INTERNAL"}`:            0, // before the first failure
		`aegis_requests_total{service="svc",kind="rpc",endpoint="alone",code="OVERLOADED"}`:      0,
		`aegis_requests_total{service="svc",kind="event",endpoint="order.*",code="UNAVAILABLE"}`: 0,
		`aegis_requests_total{service="svc",kind="call",endpoint="svc.m",code="CIRCUIT_OPEN"}`:   0,
		`aegis_requests_total{service="svc",kind="call",endpoint="svc.m",code=""}`:               3,
		`aegis_requests_total{service="svc",kind="event",endpoint="order.*",code=""}`:            1,
		`aegis_request_duration_seconds_count{service="svc",kind="rpc",endpoint="m"}`:            5,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="0.25"}`: 2,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="50"}`:   5,
		`aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m",le="+Inf"}`: 5,
		`aegis_connections{service="svc"}`:                                                       2,
		`aegis_leader{service="svc",group="default"}`:                                            1,
		`aegis_breaker_open{service="svc",target="svc"}`:                                         0,
		`aegis_in_flight{service="svc",kind="rpc",endpoint="m"}`:                                 0,
		`aegis_shed_total{service="svc",kind="rpc",endpoint="m"}`:                                0,
		`aegis_expired_total{service="svc",kind="rpc",endpoint="m"}`:                             0,
		`aegis_pending{service="svc",kind="event",endpoint="order.*"}`:                           0,
	} {
		if got, ok := samples[sample]; !ok || got != want {
			t.Errorf("%s is %v (present: %v); want %v", sample, got, ok, want)
		}
	}
	if sum := samples[`aegis_request_duration_seconds_sum{service="svc",kind="rpc",endpoint="m"}`]; sum < 0.9 || sum > 10 {
		t.Errorf("the requests took %v s in all; want 0.9 to 10", sum)
	}
	if up := samples[`aegis_uptime_seconds{service="svc"}`]; up <= 0 || up > 60 {
		t.Errorf("the uptime is %v s; want more than 0 and at most 60", up)
	}
	last := 0.0 // buckets are cumulative
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, `aegis_request_duration_seconds_bucket{service="svc",kind="rpc",endpoint="m"`) {
			value, _ := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
			if value < last {
				t.Errorf("the bucket is smaller than the one before: %s", line)
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
			t.Errorf("%s answers %d %s; want %d", path, status, body, want)
		}
		for _, w := range words {
			if !strings.Contains(body, w) {
				t.Errorf("%s answers %s; want it to contain %s", path, body, w)
			}
		}
	}
	expect("/healthz", 200)
	expect("/readyz", 503, `"service":"UNAVAILABLE: `, "not been started")
	start(t, svc)
	expect("/readyz", 200, `"database":"ok"`, `"disk":"ok"`, `"connection":"ok"`)
	broken.Store(true)
	eventually(t, "/readyz answers 503", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"database":"INTERNAL: connection refused"`, `"disk":"ok"`)
	expect("/healthz", 200)
	broken.Store(false)
	eventually(t, "/readyz answers 200 again", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })

	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "/readyz answers 503", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"connection":"UNAVAILABLE: `)
	expect("/healthz", 200)
	srv = startServer(t, samePort)
	eventually(t, "/readyz answers 200 again", func() bool { status, _ := get(t, svc, "/readyz"); return status == 200 })
	eventually(t, "both connections are back", func() bool { return svc.Stats().Connected == 2 })

	client := newService(t, srv, "client")
	eventually(t, "a call reaches the handler again", func() bool {
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
	eventually(t, "/readyz answers 503", func() bool { status, _ := get(t, svc, "/readyz"); return status == 503 })
	expect("/readyz", 503, `"service":"CLOSED: `, "stopping")
	expect("/healthz", 200) // because Stop still waits for the handler
	close(release)
	if err := <-stopped; err != nil {
		t.Errorf("Stop returned %v", err)
	}
	expect("/healthz", 503, "svc was stopped")
	expect("/readyz", 503)
	if status, _ := get(t, svc, "/"); status != http.StatusNotFound {
		t.Errorf("/ answers %d; want 404", status)
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
	eventually(t, "the event is handled", func() bool { return endpointStats(t, shop, "event", "order.*").Requests == 1 })

	// Other programs answer too: a service that does not use aegis, and some that send invalid statistics.
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if _, err := micro.AddService(nc, micro.Config{Name: "plain", Version: "1.0.0", Endpoint: &micro.EndpointConfig{Subject: "plain", Handler: micro.HandlerFunc(func(micro.Request) {})}}); err != nil {
		t.Fatal(err)
	}
	for _, invalid := range []string{"", "[]", `{"endpoints":[null,{"data":[]},{"data":{"callers":7}}]}`, "\xff\xff"} {
		if _, err := nc.Subscribe("$SRV.STATS", func(m *nats.Msg) { _ = m.Respond([]byte(invalid)) }); err != nil {
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
		t.Errorf("Mermaid(nil) returned %q", got)
	}
	got := aegis.Mermaid([]aegis.Dependency{
		{From: "end", To: "b", Endpoint: `order.>|"x"`, Requests: 3, Errors: 1}, // end is a keyword in Mermaid
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
