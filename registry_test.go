package aegis_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// handleExclusively adds the handlers of a child process in the role "leader". The method who returns the term and the instance's
// id. The method write waits until its ctx ends and then calls the service "store" with the term.
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

// instances returns the instances of a service that s discovers, each as "<id> <status>".
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
	eventually(t, "Watch yields the method that was added", func() bool { return strings.HasSuffix(seen.all()[len(seen.all())-1], " 4") })
	b := newService(t, srv, "risk", aegis.WithID("b"), aegis.WithHeartbeat(time.Second))
	start(t, b)
	eventually(t, "both instances are discovered", func() bool { return len(instances(t, client, "risk")) == 2 })
	eventually(t, "Watch yields a as the leader", func() bool { return seen.all()[len(seen.all())-1] == "a ACTIVE 4, b ACTIVE 0" })
	heartbeats := func() (n int) {
		for _, line := range announced.all() {
			if line == "heartbeat b" {
				n++
			}
		}
		return n
	}
	n := len(seen.all())
	eventually(t, "b has sent two heartbeats", func() bool { return heartbeats() >= 2 })
	if all := seen.all(); len(all) != n {
		t.Errorf("Watch yields a list after a heartbeat that changed nothing: %q", all)
	}
	entry := func() aegis.Instance { list, _ := client.Discover(t.Context(), "risk"); return list[len(list)-1] }
	first := entry()
	eventually(t, "a heartbeat updates Seen", func() bool { return entry().Seen.After(first.Seen) })
	if err := b.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, "b is gone", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	if took := time.Since(begin); took > 500*time.Millisecond {
		t.Errorf("b was gone only %v after it stopped", took)
	}
	if err := a.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both instances are gone", func() bool { return len(instances(t, client, "risk")) == 0 })
	cancel()
	<-watching
	eventually(t, "both instances have announced that they came and went", func() bool {
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
	p := startLeader(t, srv, "Aggressive", &reigns) // sends a heartbeat every second
	eventually(t, "the instance is discovered", func() bool { return len(instances(t, client, "risk")) == 1 })
	time.Sleep(1500 * time.Millisecond) // so that a heartbeat has refreshed the entry
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	eventually(t, "the instance is gone", func() bool { return len(instances(t, client, "risk")) == 0 })
	if took := time.Since(begin); took < 1500*time.Millisecond || took > 4*time.Second {
		t.Errorf("the instance was gone after %v; want 1.5 to 4 s", took)
	}
}

// TestFailedCallsLeakNothing calls services and methods that do not exist. The calls leave no goroutines behind in the client and
// no consumers in the server.
func TestFailedCallsLeakNothing(t *testing.T) { // not parallel to other tests, because it counts goroutines
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
		t.Errorf("%d goroutines are left; want at most 20", n)
	}
	st, err := manage(t, srv).Stream(t.Context(), "KV_aegis_registry")
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().State.Consumers; n > 1 { // the client may watch the entries of risk
		t.Errorf("%d consumers are left; want at most 1", n)
	}
}

func TestThousandInstances(t *testing.T) { // not parallel to other tests, because it uses the whole machine
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
	eventually(t, "all instances are discovered", func() bool { return len(instances(t, client, "risk")) == n })
	answered := map[string]bool{}
	for range n {
		who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.RoundRobin))
		if err != nil {
			t.Fatal(err)
		}
		answered[who] = true
	}
	if len(answered) < n*9/10 { // heartbeats rebuild the list, in the same order
		t.Errorf("%d calls in turn reached %d instances; want at least 9 of 10", n, len(answered))
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
	eventually(t, "a tenth of the instances is left", func() bool { return len(instances(t, client, "risk")) == n/10 })
}

func TestBalance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var all []*aegis.Service
	release := make(chan struct{})
	var blocked [3]atomic.Int32
	for i := range 3 {
		s := newService(t, srv, "risk", aegis.WithID(strconv.Itoa(i)))
		handle(t, s, "who", func(ctx context.Context, block bool) (string, error) {
			if block {
				blocked[i].Add(1)
				<-release
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
	eventually(t, "all instances are discovered", func() bool { return len(instances(t, client, "risk")) == 3 })
	if by := count(30, aegis.Balance(aegis.RoundRobin)); by["0"] != 10 || by["1"] != 10 || by["2"] != 10 {
		t.Errorf("30 calls by RoundRobin: %v; want 10 for each instance", by)
	}
	if by := count(300, aegis.Balance(aegis.Random)); by["0"] < 50 || by["1"] < 50 || by["2"] < 50 {
		t.Errorf("300 calls by Random: %v; want at least 50 for each instance", by)
	}
	by := map[string]int{}
	for range 10 { // each method has turns of its own
		for range 2 {
			if who, err := call[int, string](client, "risk", "only0", 1, aegis.Balance(aegis.RoundRobin)); who != "0" || err != nil {
				t.Errorf("only0 was answered by %q, %v; want instance 0", who, err)
			}
		}
		for who := range count(1, aegis.Balance(aegis.RoundRobin)) {
			by[who]++
		}
	}
	if len(by) != 3 {
		t.Errorf("calls between calls of another method: %v; want some for each instance", by)
	}
	_, err := call[int, string](client, "risk", "none", 1, aegis.Balance(aegis.RoundRobin))
	fails(t, err, aegis.ErrUnimplemented, "rpc.risk.none")
	_, err = call[bool, string](client, "risk", "who", false, aegis.Balance(7))
	fails(t, err, aegis.ErrInvalid, "Balance(7)")

	// LeastLoaded spreads calls that hang evenly.
	var hanging sync.WaitGroup
	total := func() int32 { return blocked[0].Load() + blocked[1].Load() + blocked[2].Load() }
	for i := range int32(30) {
		hanging.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, _ = aegis.Call[bool, string](ctx, client, "risk", "who", true, aegis.Balance(aegis.LeastLoaded))
		})
		eventually(t, "the call has reached its handler", func() bool { return total() == i+1 })
	}
	for i := range blocked {
		if n := blocked[i].Load(); n < 7 || n > 13 {
			t.Errorf("%d calls hang on instance %d; want 7 to 13", n, i)
		}
	}
	close(release)
	hanging.Wait()

	// An instance that has crashed is skipped at once, although the registry still lists it.
	crashed := startProcess(t, "crashing", srv)
	if line, _ := crashed.line(t); line != "ready" {
		t.Fatal(line)
	}
	eventually(t, "the fourth instance is discovered", func() bool { return len(instances(t, client, "risk")) == 4 })
	if err := crashed.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server knows that the instance is gone", func() bool {
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

// TestUnhealthyInstance checks that an instance whose health check fails or panics gives up the leadership, receives none of the
// calls, events and commands that the instances share, and is not chosen by Balance. It still answers calls that are addressed to
// it.
func TestUnhealthyInstance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var failing atomic.Bool
	var panicking atomic.Bool
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
		if panicking.Load() {
			panic("ouch")
		}
		if failing.Load() {
			return errors.New("no database")
		}
		return nil
	}))
	eventually(t, "a leads", a.IsLeader)
	b := add("b", aegis.WithHealthCheck("fine", func(context.Context) error { return nil }))
	eventually(t, "both instances are discovered", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "b STANDBY"}) })
	for round := range 2 {
		failing.Store(round == 0)
		panicking.Store(round == 1)
		eventually(t, "a is UNHEALTHY and b leads", func() bool {
			return slices.Equal(instances(t, client, "risk"), []string{"a UNHEALTHY", "b ACTIVE"}) && b.IsLeader() && !a.IsLeader()
		})
		eventually(t, "only b gets calls", func() bool {
			for range 20 {
				if who, err := call[int, string](client, "risk", "who", 1); who != "b" || err != nil {
					return false
				}
			}
			return true
		})
		for range 20 {
			if who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.RoundRobin)); who != "b" || err != nil {
				t.Errorf("got the answer of %q, %v; want b", who, err)
			}
			if who, err := call[int, string](client, "risk", "leader", 1, aegis.Sticky()); who != "b" || err != nil {
				t.Errorf("got the answer of %q, %v; want b", who, err)
			}
			if who, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance("a")); who != "a" || err != nil {
				t.Errorf("got the answer of %q, %v; want a", who, err)
			}
		}
		_, err := call[int, string](client, "risk", "leader", 1, aegis.ToInstance("a"))
		fails(t, err, aegis.ErrNotActive, "b")
		eventually(t, "only b gets commands, after the pull requests of a have ended", func() bool {
			for range 20 {
				if who := wait(t, send[int, string](t, client, "risk", "work", 1)); who != "b" {
					return false
				}
			}
			return true
		})
		failing.Store(false)
		panicking.Store(false)
		eventually(t, "a is healthy again", func() bool {
			return slices.Equal(instances(t, client, "risk"), []string{"a STANDBY", "b ACTIVE"})
		})
		eventually(t, "a gets calls", func() bool { who, err := call[int, string](client, "risk", "who", 1); return who == "a" && err == nil })
		eventually(t, "a gets commands", func() bool { return wait(t, send[int, string](t, client, "risk", "work", 1)) == "a" })
		if round == 0 {
			if err := b.Stop(t.Context()); err != nil { // releases the leadership
				t.Fatal(err)
			}
			eventually(t, "a leads again", a.IsLeader)
			b = add("b")
			eventually(t, "b is discovered again", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE", "b STANDBY"}) })
		}
	}
	_, err := aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithHealthCheck("", nil))
	fails(t, err, aegis.ErrInvalid, "WithHealthCheck")
}

// TestHangingHealthCheck checks that a health check that hangs counts as failed and delays nothing else.
func TestHangingHealthCheck(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var hanging atomic.Bool
	release := make(chan struct{})
	s := newService(t, srv, "risk", aegis.WithID("a"), aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("hangs", func(ctx context.Context) error {
		if hanging.Load() {
			<-release // ignores ctx
		}
		return nil
	}))
	start(t, s)
	eventually(t, "the instance is healthy", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
	hanging.Store(true)
	eventually(t, "the instance is UNHEALTHY", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a UNHEALTHY"}) })
	hanging.Store(false)
	close(release)
	eventually(t, "the instance is healthy again", func() bool { return slices.Equal(instances(t, client, "risk"), []string{"a ACTIVE"}) })
}

// TestRegistryBucketWithoutTTL checks that Start reports an existing bucket that does not allow TTLs on messages.
func TestRegistryBucketWithoutTTL(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	if _, err := manage(t, srv).CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "aegis_registry"}); err != nil {
		t.Fatal(err)
	}
	svc := newService(t, srv, "risk")
	handle(t, svc, "m", echo)
	fails(t, svc.Start(t.Context()), aegis.ErrInvalid, "KV_aegis_registry", "allow_msg_ttl")
}

// TestNATSMicroProtocol sends the requests that the nats tool sends, and checks that the answers have what their schemas require:
// https://github.com/nats-io/jsm.go/tree/main/schema_source/micro/v1
func TestNATSMicroProtocol(t *testing.T) {
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
	add("shop", "node-1") // an id is unique only within its service
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
				t.Fatalf("got %d of %d answers to %s: %v", len(answers), want, subject, err)
			}
			var v map[string]any
			if err := json.Unmarshal(m.Data, &v); err != nil {
				t.Fatalf("%s: %v: %s", subject, err, m.Data)
			}
			answers = append(answers, v)
		}
		if m, err := sub.NextMsg(50 * time.Millisecond); err == nil {
			t.Errorf("got one answer too many to %s: %s", subject, m.Data)
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
					t.Errorf("the answer to %s has no %s: %v", verb, key, v)
				}
			}
			if v["type"] != "io.nats.micro.v1."+strings.ToLower(verb)+"_response" || v["version"] != "1.2.3" || v["metadata"].(map[string]any)["zone"] != "eu" {
				t.Errorf("the answer to %s has a wrong type, version or metadata: %v", verb, v)
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
						t.Errorf("the answer to %s has an endpoint without %s: %v", verb, key, e)
					}
				}
				if !name.MatchString(fmt.Sprint(e["name"])) {
					t.Errorf("the endpoint name %v is not valid", e["name"])
				}
				endpoints = append(endpoints, fmt.Sprint(e["name"], " ", e["subject"], " ", e["queue_group"]))
			}
			service := fmt.Sprint(v["name"])
			want := []string{
				"alone rpc." + service + ".alone " + service, "m rpc." + service + ".m " + service,
				"order-ALL events.order.> " + service, "order-ANY events.order.* " + service, "work commands." + service + ".work " + service,
			}
			if got := sorted(endpoints); !slices.Equal(got, want) {
				t.Errorf("%s lists the endpoints %q; want %q", verb, got, want)
			}
		}
		if want := sorted(slices.Concat(ids, ids[:2], ids[:1])); !slices.Equal(sorted(seen), want) {
			t.Errorf("%s was answered by %v; want %v", verb, sorted(seen), want)
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
			t.Errorf("the statistics of the endpoint m are wrong: %v", e)
		}
	}
}

// LeastLoaded counts all calls from here that are addressed to an instance, however they were addressed.
func TestLeastLoadedCountsAllCalls(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]aegis.CallOption{"ToInstance": aegis.ToInstance("busy"), "Sticky": aegis.Sticky()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			client := newService(t, srv, "client")
			var inside journal[string]
			release := make(chan struct{})
			for _, id := range []string{"busy", "idle", "lazy"} {
				s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithFailover(brisk))
				handle(t, s, "who", func(context.Context, int) (string, error) { return id, nil })
				handle(t, s, "hang", func(context.Context, int) (string, error) {
					inside.add(id)
					<-release
					return id, nil
				}, aegis.Exclusive())
				handle(t, s, "hang_here", func(context.Context, int) (string, error) {
					inside.add(id)
					<-release
					return id, nil
				})
				start(t, s)
				if id == "busy" {
					eventually(t, "it leads", s.IsLeader)
				}
			}
			var calls sync.WaitGroup
			method := map[string]string{"ToInstance": "hang_here", "Sticky": "hang"}[name]
			for range 20 { // before the client has looked into the registry
				calls.Go(func() {
					if who, err := call[int, string](client, "risk", method, 1, opt); who != "busy" || err != nil {
						t.Error(who, err)
					}
				})
			}
			inside.wait(t, 20)
			eventually(t, "all instances are discovered", func() bool { return len(instances(t, client, "risk")) == 3 })
			by := map[string]int{}
			for range 300 {
				who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.LeastLoaded))
				if err != nil {
					t.Fatal(err)
				}
				by[who]++
			}
			if by["busy"] > 15 || by["idle"] < 50 || by["lazy"] < 50 {
				t.Errorf("300 calls went to %v, want nearly none for the busy instance", by)
			}
			close(release)
			calls.Wait()
			for range 300 {
				who, err := call[int, string](client, "risk", "who", 1, aegis.Balance(aegis.LeastLoaded))
				if err != nil {
					t.Fatal(err)
				}
				by[who]++
			}
			if by["busy"] < 30 {
				t.Errorf("600 calls went to %v, want the busy instance to get its share when it is idle again", by)
			}
		})
	}
}
