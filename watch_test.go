package aegis_test

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// consumers returns how many consumers a bucket has.
func consumers(tb testing.TB, srv *server.Server, bucket string) int {
	tb.Helper()
	st, err := manage(tb, srv).Stream(context.Background(), "KV_"+bucket)
	if err != nil {
		tb.Fatal(err)
	}
	return st.CachedInfo().State.Consumers
}

// Groups that were led once, a lock for each order for example, leave nothing behind.
func TestGroupsThatEndedLeaveNothingBehind(t *testing.T) { // not parallel to other tests, because it counts goroutines
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk")
	lead := func(group string) {
		t.Helper()
		policy := aegis.FailoverPolicy{Lease: 100 * time.Millisecond, Valid: 80 * time.Millisecond, Renew: 30 * time.Millisecond, Timeout: 30 * time.Millisecond}
		if err := svc.Lead(t.Context(), group, policy, func(context.Context, uint64) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	lead("first")
	before := runtime.NumGoroutine()
	for i := range 100 {
		lead(fmt.Sprint("order-", i))
	}
	eventually(t, "the goroutines have ended", func() bool { return runtime.NumGoroutine() <= before+5 })
	eventually(t, "the server has removed the consumers", func() bool { return consumers(t, srv, "aegis_leaders") == 0 })
	lead("order-1")
}

// Copies that were not used for a minute end, whether the service exists or not. Those that are in use go on.
func TestUnusedWatchesEnd(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	handleExclusively := newService(t, srv, "risk", aegis.WithID("a"), aegis.WithFailover(brisk))
	handle(t, handleExclusively, "m", echo, aegis.Exclusive())
	start(t, handleExclusively)
	client := newService(t, srv, "shop")
	ctx := t.Context()
	seen := watchLists(t, client, "risk")
	seen.wait(t, 1)
	for i := range 200 {
		name := fmt.Sprint("nobody", i)
		if list, err := client.Discover(ctx, name); err != nil || len(list) != 0 {
			t.Fatal(list, err)
		}
		_, err := client.LeaderOf(ctx, name)
		fails(t, err, aegis.ErrNotFound, name)
	}
	if n := consumers(t, srv, "aegis_registry"); n != 201 {
		t.Errorf("%d consumers; want 201", n)
	}
	time.Sleep(time.Minute) // which is how long they last
	eventually(t, "the copies of the unknown services have ended", func() bool {
		return consumers(t, srv, "aegis_registry") == 1 && consumers(t, srv, "aegis_leaders") == 2
	})
	b := newService(t, srv, "risk", aegis.WithID("b"))
	start(t, b)
	eventually(t, "Watch still yields changes", func() bool { n := counts(seen); return n[len(n)-1] == 2 })
	if list, err := client.Discover(ctx, "nobody1"); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
}

// More services are looked up than have a copy at once.
func TestManyServicesAreLookedUp(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	start(t, newService(t, srv, "risk", aegis.WithID("a")))
	client := newService(t, srv, "shop")
	for i := range 1200 {
		name := fmt.Sprint("nobody", i)
		if list, err := client.Discover(t.Context(), name); err != nil || len(list) != 0 {
			t.Fatal(list, err)
		}
		if got := instances(t, client, "risk"); !slices.Equal(got, []string{"a ACTIVE"}) {
			t.Fatal(got)
		}
	}
	eventually(t, "the server has removed the consumers", func() bool { return consumers(t, srv, "aegis_registry") <= 1024 })
}

// The account allows fewer consumers than the streams that aegis makes.
func TestAccountWithFewConsumers(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	limitAccount(t, srv, server.JetStreamAccountLimits{MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: 2})
	start(t, newService(t, srv, "risk", aegis.WithID("a")))
	client := newService(t, srv, "shop")
	for _, name := range []string{"risk", "nobody"} {
		if _, err := client.Discover(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	_, err := client.Discover(t.Context(), "another")
	fails(t, err, aegis.ErrUnavailable, "10026", "max_consumers")
}

// watchLists notes the lists that Watch yields until the test ends.
func watchLists(tb testing.TB, client *aegis.Service, service string) *journal[[]aegis.Instance] {
	var seen journal[[]aegis.Instance]
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for list, err := range client.Watch(ctx, service) {
			if err != nil {
				tb.Error(err)
				return
			}
			seen.add(list)
		}
	}()
	tb.Cleanup(func() { cancel(); <-done })
	return &seen
}

// counts returns how many instances each list has.
func counts(seen *journal[[]aegis.Instance]) (n []int) {
	for _, list := range seen.all() {
		n = append(n, len(list))
	}
	return n
}

// All instances live on while the server is away, or out of reach, for longer than their entries do. Nobody sees them vanish.
func TestLiveInstancesOutlastOutage(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]func(t *testing.T) (url string, away, back func()){
		"server restarts": func(t *testing.T) (string, func(), func()) {
			store := withJetStream(t)
			srv := startServer(t, store)
			samePort := onPort(srv)
			return srv.ClientURL(), func() { srv.Shutdown(); srv.WaitForShutdown() }, func() { startServer(t, samePort, store) }
		},
		"server is out of reach": func(t *testing.T) (string, func(), func()) {
			p := startProxy(t, startServer(t, withJetStream(t)))
			return "nats://" + p.address, func() { p.stall(); p.cut() }, p.heal
		},
		"server hangs": func(t *testing.T) (string, func(), func()) {
			p := startProxy(t, startServer(t, withJetStream(t)))
			return "nats://" + p.address, p.stall, p.heal
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url, away, back := outage(t)
			add := func(service, id string, heartbeat time.Duration) *aegis.Service {
				s, err := aegis.New(service, aegis.WithURL(url), aegis.WithID(id), aegis.WithHeartbeat(heartbeat))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = s.Stop(context.Background()) })
				return s
			}
			client := add("shop", "client", time.Second)
			for _, id := range []string{"a", "b", "c"} {
				s := add("risk", id, time.Second)
				handle(t, s, "m", echo)
				start(t, s)
			}
			want := []string{"a ACTIVE", "b ACTIVE", "c ACTIVE"}
			eventually(t, "the instances are discovered", func() bool { return slices.Equal(instances(t, client, "risk"), want) })
			seen := watchLists(t, client, "risk")
			seen.wait(t, 1)
			away()
			begin := time.Now()
			whole := func(until time.Time) {
				for time.Now().Before(until) {
					if got := instances(t, client, "risk"); !slices.Equal(got, want) {
						t.Fatalf("Discover returns %q %v after the beginning of the outage", got, time.Since(begin))
					}
					time.Sleep(time.Millisecond)
				}
			}
			whole(begin.Add(5 * time.Second)) // an entry lasts for 3 s
			back()
			whole(begin.Add(13 * time.Second))
			if got := counts(seen); !slices.Equal(got, []int{3}) {
				t.Errorf("Watch yields %d instances; want 3 once", got)
			}
			if _, err := call[string, string](client, "risk", "m", "", aegis.Balance(aegis.Random)); err != nil {
				t.Error(err)
			}
		})
	}
}

// All instances live on, and stay connected, while the cluster has no quorum for longer than their entries last.
func TestLiveInstancesOutlastLossOfQuorum(t *testing.T) {
	t.Parallel()
	servers, startAgain := startClusterToRestart(t, 3)
	add := func(service, id string) *aegis.Service {
		return newService(t, servers[0], service, aegis.WithID(id), aegis.WithReplicas(3), aegis.WithHeartbeat(time.Second))
	}
	client := add("shop", "client")
	start(t, client)
	want := []string{"a ACTIVE", "b ACTIVE", "c ACTIVE"}
	for _, id := range []string{"a", "b", "c"} {
		start(t, add("risk", id))
	}
	eventually(t, "the instances are discovered", func() bool { return slices.Equal(instances(t, client, "risk"), want) })
	seen := watchLists(t, client, "risk")
	seen.wait(t, 1)
	for i := 1; i < 3; i++ {
		servers[i].Shutdown()
		servers[i].WaitForShutdown()
	}
	time.Sleep(6 * time.Second) // an entry lasts for 3 s
	for i := 1; i < 3; i++ {
		startAgain(i)
	}
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if got := instances(t, client, "risk"); !slices.Equal(got, want) {
			t.Fatalf("Discover returns %q", got)
		}
	}
	if got := counts(seen); !slices.Equal(got, []int{3}) {
		t.Errorf("Watch yields %d instances; want 3 once", got)
	}
}

// The bucket of the registry, or of the leaders, is deleted or emptied while it is in use. A caller's copy is right again within
// seconds, and no live instance vanishes.
func TestBucketDeletedWhileInUse(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(t *testing.T, srv *server.Server, bucket string) error{
		"deleted": func(t *testing.T, srv *server.Server, bucket string) error {
			return manage(t, srv).DeleteKeyValue(t.Context(), bucket)
		},
		"emptied": func(t *testing.T, srv *server.Server, bucket string) error {
			st, err := manage(t, srv).Stream(t.Context(), "KV_"+bucket)
			if err != nil {
				return err
			}
			return st.Purge(t.Context())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			client := newService(t, srv, "shop")
			add := func(id string) *aegis.Service {
				s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithHeartbeat(time.Second), aegis.WithFailover(brisk))
				handle(t, s, "m", echo, aegis.Exclusive())
				start(t, s)
				return s
			}
			a := add("a")
			leader := func() string { id, _ := client.LeaderOf(t.Context(), "risk"); return id }
			eventually(t, "a leads", func() bool { return leader() == "a" })
			// An entry of an instance that does not exist any more. It would expire in a minute.
			nc := client.Conn()
			ghost, err := json.Marshal(aegis.Instance{Service: "risk", ID: "ghost", Status: "ACTIVE"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := nc.RequestMsg(&nats.Msg{Subject: "$KV.aegis_registry.risk.ghost", Data: ghost, Header: nats.Header{"Nats-TTL": {"6"}}}, time.Second); err != nil {
				t.Fatal(err)
			}
			eventually(t, "both are discovered", func() bool { return len(instances(t, client, "risk")) == 2 })
			seen := watchLists(t, client, "risk")
			for _, bucket := range []string{"aegis_registry", "aegis_leaders"} {
				if err := remove(t, srv, bucket); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			b := add("b")
			eventually(t, "the new instance is discovered", func() bool {
				got := instances(t, client, "risk")
				if !slices.ContainsFunc(got, func(i string) bool { return strings.HasPrefix(i, "a ") }) {
					t.Fatalf("a has vanished: %q", got)
				}
				return slices.ContainsFunc(got, func(i string) bool { return strings.HasPrefix(i, "b ") })
			})
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			eventually(t, "the leader is known again", func() bool {
				return a.IsLeader() && leader() == "a" || b.IsLeader() && leader() == "b"
			})
			eventually(t, "the entry that nobody refreshes has expired", func() bool { return len(instances(t, client, "risk")) == 2 })
			if took := time.Since(begin); took > 18*time.Second {
				t.Errorf("it took %v", took)
			}
			if slices.Contains(counts(seen), 0) {
				t.Errorf("Watch yields %d instances", counts(seen))
			}
		})
	}
}

// A service has one ACTIVE instance at most, also after its leader was killed, and none after all were.
func TestOneActiveInstance(t *testing.T) {
	t.Parallel()
	denied := aegis.WithNATS(nats.UserInfo("user", ""))
	for name, opts := range map[string][]aegis.Option{"": nil, "without the leaders' bucket": {denied}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t), func(o *server.Options) {
				o.Users = []*server.User{{Username: "admin"}, {Username: "user", Permissions: &server.Permissions{
					Publish: &server.SubjectPermission{Deny: []string{"$JS.API.CONSUMER.CREATE.KV_aegis_leaders.>"}},
				}}}
				o.NoAuthUser = "admin"
			})
			client := newService(t, srv, "shop", opts...)
			seen := watchLists(t, client, "risk")
			active := func() (ids []string) {
				list, err := client.Discover(t.Context(), "risk")
				if err != nil {
					t.Fatal(err)
				}
				for _, i := range list {
					if i.Status == "ACTIVE" {
						ids = append(ids, i.ID)
					}
				}
				if len(ids) > 1 {
					t.Fatalf("%q are ACTIVE", ids)
				}
				return ids
			}
			var reigns journal[reignOf]
			first := startLeader(t, srv, "Aggressive", &reigns)
			eventually(t, "the first is ACTIVE", func() bool { return len(active()) == 1 })
			before := active()[0]
			second := startLeader(t, srv, "Aggressive", &reigns)
			eventually(t, "both are discovered", func() bool { return len(instances(t, client, "risk")) == 2 })
			if err := first.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the second is ACTIVE", func() bool { ids := active(); return len(ids) == 1 && ids[0] != before })
			if err := second.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			eventually(t, "none is ACTIVE", func() bool { return len(active()) == 0 })
			if took := time.Since(begin); opts == nil && took > 1700*time.Millisecond { // the Lease is 1.2 s
				t.Errorf("it took %v", took)
			}
			begin = time.Now()
			last := func() []aegis.Instance { all := seen.all(); return all[len(all)-1] }
			eventually(t, "Watch yields that none is ACTIVE", func() bool {
				return !slices.ContainsFunc(last(), func(i aegis.Instance) bool { return i.Status == "ACTIVE" })
			})
			if took := time.Since(begin); took > 400*time.Millisecond { // the entry expires later
				t.Errorf("it took %v longer than with Discover", took)
			}
			for _, list := range seen.all() {
				n := 0
				for _, i := range list {
					if i.Status == "ACTIVE" {
						n++
					}
				}
				if n > 1 {
					t.Errorf("Watch yields %d ACTIVE instances: %+v", n, list)
				}
			}
		})
	}
}

// A heartbeat updates Load and Seen, and wakes nobody.
func TestHeartbeatWakesNobody(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	s := newService(t, srv, "risk", aegis.WithID("a"), aegis.WithHeartbeat(time.Second))
	running, finish := make(chan struct{}), make(chan struct{})
	handle(t, s, "m", func(context.Context, int) (int, error) { close(running); <-finish; return 0, nil })
	start(t, s)
	eventually(t, "the instance is discovered", func() bool { return len(instances(t, client, "risk")) == 1 })
	seen := watchLists(t, client, "risk")
	seen.wait(t, 1)
	called := make(chan error)
	go func() {
		_, err := call[int, int](client, "risk", "m", 1)
		called <- err
	}()
	<-running
	eventually(t, "Discover shows the load", func() bool {
		list, err := client.Discover(t.Context(), "risk")
		return err == nil && list[0].Load == 1
	})
	close(finish)
	if err := <-called; err != nil {
		t.Error(err)
	}
	eventually(t, "Discover shows that the load is gone", func() bool {
		list, err := client.Discover(t.Context(), "risk")
		return err == nil && list[0].Load == 0
	})
	if got := seen.all(); len(got) != 1 {
		t.Errorf("Watch yields %d lists; want 1", len(got))
	}
}
