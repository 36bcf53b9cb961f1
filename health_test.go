package aegis_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
)

// A check that takes longer than a heartbeat has failed, whatever it returns at last.
func TestLateHealthCheck(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	watcher := newService(t, srv, "watcher")
	svc := newService(t, srv, "svc", aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("database", func(context.Context) error {
		time.Sleep(1400 * time.Millisecond)
		return nil
	}))
	handle(t, svc, "m", echo)
	start(t, svc)
	var seen []string
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		list, err := watcher.Discover(t.Context(), "svc")
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 1 && (len(seen) == 0 || seen[len(seen)-1] != list[0].Status) {
			seen = append(seen, list[0].Status)
		}
	}
	if !slices.Equal(seen, []string{"UNHEALTHY"}) {
		t.Errorf("the status was %v; want UNHEALTHY all the time", seen)
	}
}

func TestHealthTolerance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var fails atomic.Bool
	var runs atomic.Int32
	svc := newService(t, srv, "svc", aegis.WithHeartbeat(time.Second), aegis.WithHealthTolerance(3), aegis.WithHealthCheck("database", func(context.Context) error {
		defer runs.Add(1)
		if fails.Load() {
			return errors.New("no connection")
		}
		return nil
	}))
	handle(t, svc, "m", echo)
	start(t, svc)
	ready := func() bool { status, _ := get(t, svc, "/readyz"); return status == http.StatusOK }
	if !ready() {
		t.Error("it is not ready after its first result")
	}
	for _, failing := range []bool{true, false} {
		fails.Store(failing)
		begin := runs.Load()
		eventually(t, "its state changes", func() bool { return ready() != failing })
		if n := runs.Load() - begin; n < 3 || n > 4 { // one may have run with the former state
			t.Errorf("the state changed after %d results, want 3", n)
		}
	}
	_, err := aegis.New("svc", aegis.WithURL(srv.ClientURL()), aegis.WithHealthTolerance(0))
	wantInvalid(t, err)
}

func wantInvalid(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, aegis.ErrInvalid) {
		t.Errorf("got %v, want an invalid argument", err)
	}
}

// A process that only calls Lead runs its health checks too, and does not lead while one fails.
func TestHealthChecksOfLead(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	var healthy, leads atomic.Bool
	svc := newService(t, srv, "svc", aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("database", func(context.Context) error {
		if !healthy.Load() {
			return errors.New("no connection")
		}
		return nil
	}))
	if status, text := get(t, svc, "/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(text, "has not run yet") {
		t.Errorf("/readyz answers %d: %s", status, text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- svc.Lead(ctx, "reaper", aegis.Aggressive, func(ctx context.Context, _ uint64) error {
			leads.Store(true)
			<-ctx.Done()
			return nil
		})
	}()
	eventually(t, "the check has failed", func() bool {
		status, text := get(t, svc, "/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(text, "no connection")
	})
	time.Sleep(2 * time.Second)
	if leads.Load() {
		t.Error("it leads although a check fails")
	}
	healthy.Store(true)
	eventually(t, "it leads", leads.Load)
	cancel()
	<-done
}

// A term that was resigned because the instance was unhealthy takes no new work when it is healthy again. It ends as soon as what
// runs has finished.
func TestResignedTermStaysResigned(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "client")
	var fails atomic.Bool
	release, inside := make(chan struct{}), make(chan struct{}, 99)
	instance := func(id string, opts ...aegis.Option) *aegis.Service {
		svc := newService(t, srv, "svc", append(opts, aegis.WithID(id), aegis.WithFailover(aegis.Conservative))...)
		handle(t, svc, "m", func(_ context.Context, what string) (string, error) {
			if what == "hold" {
				inside <- struct{}{}
				<-release
			}
			return id, nil
		}, aegis.Exclusive())
		start(t, svc)
		return svc
	}
	first := instance("first", aegis.WithHeartbeat(time.Second), aegis.WithHealthCheck("database", func(context.Context) error {
		if fails.Load() {
			return errors.New("no connection")
		}
		return nil
	}))
	eventually(t, "the first leads", first.IsLeader)
	second := instance("second")
	held := make(chan error, 1)
	go func() { _, err := call[string, string](client, "svc", "m", "hold", aegis.Sticky()); held <- err }()
	<-inside
	fails.Store(true)
	eventually(t, "it is unhealthy", func() bool { status, _ := get(t, first, "/readyz"); return status != http.StatusOK })
	fails.Store(false)
	eventually(t, "it is healthy again", func() bool { status, _ := get(t, first, "/readyz"); return status == http.StatusOK })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if who, err := aegis.Call[string, string](ctx, client, "svc", "m", "x"); err == nil {
		t.Errorf("%s has answered, although its term was resigned", who)
	}
	begin := time.Now()
	close(release)
	eventually(t, "the second leads", second.IsLeader)
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("it took %v until another instance led", d)
	}
	<-held
}

func TestResign(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "client")
	inside := make(chan struct{}, 9)
	instance := func(id string) *aegis.Service {
		svc := newService(t, srv, "svc", aegis.WithID(id), aegis.WithFailover(aegis.Aggressive))
		handle(t, svc, "m", func(ctx context.Context, what string) (string, error) {
			switch what {
			case "slow":
				inside <- struct{}{}
				time.Sleep(1500 * time.Millisecond) // longer than Valid
			case "hang":
				inside <- struct{}{}
				<-ctx.Done()
			}
			return id, nil
		}, aegis.Exclusive())
		start(t, svc)
		return svc
	}
	a := instance("a")
	eventually(t, "a leads", a.IsLeader)
	b := instance("b")
	wantLeader := func(want string) {
		t.Helper()
		eventually(t, want+" leads", func() bool {
			who, err := client.LeaderOf(t.Context(), "svc")
			return err == nil && who == want
		})
	}
	wantLeader("a")
	if err := b.Resign(t.Context()); !errors.Is(err, aegis.ErrNotActive) {
		t.Errorf("got %v", err)
	}
	slow := make(chan error, 1)
	go func() {
		who, err := call[string, string](client, "svc", "m", "slow", aegis.Sticky())
		if who != "a" {
			err = errors.Join(err, errors.New("answered by "+who))
		}
		slow <- err
	}()
	<-inside
	begin := time.Now()
	if err := a.Resign(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-slow; err != nil {
		t.Errorf("the handler that ran: %v", err)
	}
	eventually(t, "b leads", b.IsLeader)
	if d := time.Since(begin); d > 4*time.Second {
		t.Errorf("Resign took %v", d)
	}
	wantLeader("b")
	eventually(t, "a knows that b leads", func() bool { // a's copy may be later than that of client
		who, err := a.Leader(t.Context())
		if who == "a" {
			t.Fatal("a takes itself for the leader")
		}
		return err == nil && who == "b"
	})
	hung := make(chan error, 1)
	go func() { _, err := call[string, string](client, "svc", "m", "hang", aegis.Sticky()); hung <- err }() // b may only just have begun
	<-inside
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := b.Resign(ctx); !errors.Is(err, aegis.ErrTimeout) {
		t.Errorf("got %v", err)
	}
	eventually(t, "a leads again", a.IsLeader)
	<-hung
	time.Sleep(100 * time.Millisecond)
	if b.IsLeader() {
		t.Error("two lead")
	}
	if _, err := client.LeaderOf(t.Context(), "nobody"); !errors.Is(err, aegis.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, err := client.LeaderOf(t.Context(), "no.name"); !errors.Is(err, aegis.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

// An instance that does not lead never says that it does, although the key may still name its former self.
func TestLeaderAndIsLeaderAgree(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	first := newService(t, srv, "svc", aegis.WithID("svc-1"), aegis.WithURL("nats://"+p.address), aegis.WithFailover(aegis.Aggressive))
	handle(t, first, "m", echo, aegis.Exclusive())
	start(t, first)
	eventually(t, "it leads", first.IsLeader)
	p.stall() // as if it were killed
	again := newService(t, srv, "svc", aegis.WithID("svc-1"), aegis.WithFailover(aegis.Aggressive))
	handle(t, again, "m", echo, aegis.Exclusive())
	start(t, again)
	for !again.IsLeader() {
		if who, err := again.Leader(t.Context()); err == nil && who == "svc-1" && !again.IsLeader() {
			t.Fatal("it names itself, and does not lead")
		}
	}
	p.heal()
}

func TestSetMetadata(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc, client := newService(t, srv, "svc", aegis.WithMetadata(map[string]string{"zone": "a"})), newService(t, srv, "client")
	handle(t, svc, "m", echo)
	start(t, svc)
	zone := func(want string) {
		t.Helper()
		eventually(t, "the zone is "+want, func() bool {
			list, err := client.Discover(t.Context(), "svc")
			return err == nil && len(list) == 1 && list[0].Metadata["zone"] == want
		})
	}
	zone("a")
	md := map[string]string{"zone": "b"}
	if err := svc.SetMetadata(md); err != nil {
		t.Fatal(err)
	}
	md["zone"] = "c"
	zone("b")
	large := map[string]string{"x": strings.Repeat("x", 1<<20)}
	wantInvalid(t, svc.SetMetadata(large))
	zone("b")
	_, err := aegis.New("svc", aegis.WithURL(srv.ClientURL()), aegis.WithMetadata(large))
	wantInvalid(t, err)
	if err := svc.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := svc.SetMetadata(md); !errors.Is(err, aegis.ErrClosed) {
		t.Errorf("got %v", err)
	}
}
