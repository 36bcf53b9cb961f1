package aegis_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
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

var policies = map[string]aegis.FailoverPolicy{"Aggressive": aegis.Aggressive, "Balanced": aegis.Balanced, "Conservative": aegis.Conservative}

// A reignOf is a period during which IsLeader of an instance reported true without interruption.
type reignOf struct {
	who      string
	term     uint64 // 0 if unknown
	from, to int64  // in Unix nanoseconds of the machine's clock, which all processes share
}

// reign polls whether s leads until ctx ends. It calls report with each reign when the reign ends.
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

// checkReigns fails the test if two reigns overlap or if a later reign has no higher term.
func checkReigns(tb testing.TB, reigns []reignOf) {
	tb.Helper()
	slices.SortFunc(reigns, func(a, b reignOf) int { return cmp.Compare(a.from, b.from) })
	for i := 1; i < len(reigns); i++ {
		a, b := reigns[i-1], reigns[i]
		if b.from < a.to {
			tb.Errorf("%s and %s both led for %v; want one leader at a time", a.who, b.who, time.Duration(a.to-b.from))
		}
		if a.term != 0 && b.term != 0 && b.term <= a.term {
			tb.Errorf("term %d of %s came after term %d of %s; want a higher one", b.term, b.who, a.term, a.who)
		}
	}
}

// A contest is a group of instances of one service that campaign for the leadership. It records their reigns.
type contest struct {
	reigns  journal[reignOf]
	elected atomic.Int32 // counts the terms that began
	stop    context.CancelFunc
	members []*aegis.Service
	all     sync.WaitGroup
}

// compete makes the members campaign until finish is called or the test ends.
func compete(tb testing.TB, p aegis.FailoverPolicy, members ...*aegis.Service) *contest {
	ctx, cancel := context.WithCancel(context.Background())
	c := &contest{stop: cancel, members: members}
	for _, s := range members {
		c.all.Go(func() {
			err := s.Lead(ctx, "default", p, func(ctx context.Context, term uint64) error {
				c.elected.Add(1)
				if aegis.Term(ctx) != term {
					tb.Errorf("Term(ctx) is %d in term %d", aegis.Term(ctx), term)
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

// finish ends the campaigns and checks the recorded reigns.
func (c *contest) finish(tb testing.TB) {
	tb.Helper()
	c.stop()
	c.all.Wait()
	checkReigns(tb, c.reigns.all())
}

// leader waits until a member leads that is not in others, and returns it.
func (c *contest) leader(tb testing.TB, others ...*aegis.Service) *aegis.Service {
	tb.Helper()
	var leader *aegis.Service
	eventually(tb, "a member leads", func() bool {
		i := slices.IndexFunc(c.members, func(s *aegis.Service) bool { return s.IsLeader() && !slices.Contains(others, s) })
		if i >= 0 {
			leader = c.members[i]
		}
		return i >= 0
	})
	return leader
}

// brisk is a failover policy for tests that do not measure time and have to pass on a busy machine.
var brisk = aegis.FailoverPolicy{Lease: 1500 * time.Millisecond, Valid: time.Second, Renew: 200 * time.Millisecond, Timeout: 200 * time.Millisecond}

func TestExclusive(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var instances []*aegis.Service
	var ran journal[string] // "event <data> <attempt> <instance>" for each event that was handled
	add := func() *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithFailover(brisk))
		handle(t, s, "who", func(ctx context.Context, _ int) (string, error) {
			if aegis.Term(ctx) == 0 || !s.IsLeader() {
				t.Error("the exclusive handler runs in an instance that does not lead")
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
		t.Error("NotRun is false for a call that no instance has run")
	}
	_, err = first.Leader(t.Context())
	fails(t, err, aegis.ErrNotFound, "risk")
	add()
	add()
	for round := range 3 {
		var leader *aegis.Service
		eventually(t, "one instance is ACTIVE and the others are STANDBY", func() bool {
			list, err := client.Discover(t.Context(), "risk")
			if err != nil {
				t.Fatal(err)
			}
			states := map[string]int{}
			for _, i := range list {
				states[i.Status]++
			}
			if states["ACTIVE"] != 1 || states["STANDBY"] != 2-round || len(list) != 3-round {
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
					t.Errorf("got %s, %v; want the leader %s", who, err, leader.ID())
				}
			}
			if term, err := call[int, uint64](client, "risk", "any", 1); term != 0 || err != nil {
				t.Errorf("a handler that is not exclusive got term %d, %v; want 0", term, err)
			}
		}
		for _, s := range instances {
			if id, err := s.Leader(t.Context()); id != leader.ID() || err != nil {
				t.Errorf("Leader of %s returns %q, %v; want %s", s.ID(), id, err, leader.ID())
			}
			who, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance(s.ID()))
			if s == leader {
				if who != s.ID() || err != nil {
					t.Errorf("a call to the leader returned %q, %v", who, err)
				}
			} else if e := fails(t, err, aegis.ErrNotActive, leader.ID()); e.Details["leader"] != leader.ID() || !e.NotRun {
				t.Errorf("got error %+v; want the leader %s in the details, and NotRun", e, leader.ID())
			}
		}
		n := len(ran.all())
		for i := range 20 {
			publish(t, client, "order", "created", i)
		}
		for _, got := range ran.wait(t, n+20)[n:] {
			if !strings.HasSuffix(got, " 1 "+leader.ID()) {
				t.Errorf("got %q; want the first attempt, on the leader %s", got, leader.ID())
			}
		}
		for range 5 {
			if who := wait(t, send[int, string](t, client, "risk", "work", 1)); who != leader.ID() {
				t.Errorf("%s executed the command; want the leader %s", who, leader.ID())
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

// TestGracefulHandOverUnderLoad stops the leader ten times while callers that use Sticky call it. No caller sees an error, and no
// call runs twice.
func TestGracefulHandOverUnderLoad(t *testing.T) {
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
	eventually(t, "the first instance leads", leader.IsLeader)
	stop := hammer(t, client, 8, "risk", "m", func(err error) { failures.Add(1); t.Error(err) }, aegis.Sticky())
	for range 10 {
		next := add()
		n := ran.Load()
		eventually(t, "100 more calls have run", func() bool { return ran.Load() > n+100 })
		if err := leader.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next instance leads", next.IsLeader)
		leader = next
	}
	if calls := stop(); calls != ran.Load() {
		t.Errorf("%d calls were answered, %d calls ran, %d failed; want as many answers as runs", calls, ran.Load(), failures.Load())
	}
}

// TestStopWithExclusiveHandlerThatIgnoresCtx stops the leader while its handler goes on after the deadline of Stop. No other
// instance leads before the handler returns or the lease ends.
func TestStopWithExclusiveHandlerThatIgnoresCtx(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var running atomic.Int32
	runs := make(chan string, 10)
	add := func() *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithFailover(brisk))
		handle(t, s, "m", func(context.Context, int) (int, error) {
			if running.Add(1) > 1 {
				t.Error("two exclusive handlers run at the same time")
			}
			defer running.Add(-1)
			runs <- s.ID()
			time.Sleep(500 * time.Millisecond)
			return 1, nil
		}, aegis.Exclusive())
		start(t, s)
		return s
	}
	leader := add()
	eventually(t, "the first instance leads", leader.IsLeader)
	next := add()
	eventually(t, "the second instance knows the leader", func() bool { id, err := next.Leader(t.Context()); return id == leader.ID() && err == nil })
	go func() { _, _ = call[int, int](client, "risk", "m", 1) }()
	<-runs
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, leader.Stop(ctx), aegis.ErrTimeout, "1 handlers")
	if next.IsLeader() {
		t.Error("the second instance leads while the handler of the first one runs")
	}
	if _, err := call[int, int](client, "risk", "m", 1, aegis.Sticky()); err != nil {
		t.Error(err)
	}
	if id := <-runs; id != next.ID() {
		t.Errorf("instance %s ran the second call; want %s", id, next.ID())
	}
}

// TestLeaderKeepsLeadingWithStalledConnection checks that a leader stays elected when one of its two connections hangs.
func TestLeaderKeepsLeadingWithStalledConnection(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	// The first election in a new bucket waits for a whole lease. seed gets that over with, under a policy with a short lease.
	seed := newService(t, srv, "risk")
	if err := seed.Lead(t.Context(), "default", brisk, func(context.Context, uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	// Valid is so long that a busy machine does not end the lease, and so short that it would end while the connection stalls.
	policy := aegis.FailoverPolicy{Lease: 6 * time.Second, Valid: 5 * time.Second, Renew: 600 * time.Millisecond, Timeout: 500 * time.Millisecond}
	c := compete(t, policy, newService(t, srv, "risk", aegis.WithURL("nats://"+p.address)))
	c.leader(t)
	p.freeze()
	for end := time.Now().Add(2 * policy.Valid); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !c.members[0].IsLeader() {
			t.Fatal("the leader lost its leadership")
		}
	}
	if c.finish(t); c.elected.Load() != 1 {
		t.Errorf("%d terms began; want 1", c.elected.Load())
	}
}

// TestLeadershipLostWhileHandlersRun removes the leader's key while exclusive handlers run. The call fails with ErrFenced; the
// event and the command are handled again in the next term.
func TestLeadershipLostWhileHandlersRun(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "shop")
	var terms journal[uint64]
	s := newService(t, srv, "risk", aegis.WithFailover(brisk))
	var waitForCtx atomic.Bool
	waitForCtx.Store(true)
	recordTerm := func(ctx context.Context) error {
		terms.add(aegis.Term(ctx))
		if waitForCtx.Load() {
			<-ctx.Done()
		}
		return nil // a success, although ctx has ended
	}
	handle(t, s, "m", func(ctx context.Context, _ int) (int, error) { return 1, recordTerm(ctx) }, aegis.Exclusive())
	subscribe(t, s, "order.*", func(ctx context.Context, e aegis.Event[int]) error { return recordTerm(ctx) }, aegis.Exclusive(), aegis.Attempts(1))
	handleCommand(t, s, "work", func(ctx context.Context, c *aegis.Command[int]) (int, error) { return c.Attempt, recordTerm(ctx) }, aegis.Exclusive(), aegis.Attempts(1))
	start(t, s)
	eventually(t, "the instance leads", s.IsLeader)
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
		t.Errorf("got error %+v; want the source risk, and NotRun false", e)
	}
	if s.IsLeader() {
		t.Error("the instance still leads after its key was removed")
	}
	_, err = call[int, int](client, "risk", "m", 1, aegis.ToInstance(s.ID()))
	fails(t, err, aegis.ErrNotActive)
	waitForCtx.Store(false)
	if r := wait(t, j); r != 1 {
		t.Errorf("the command succeeded in attempt %d; want 1, because a lost leadership uses up no attempt", r)
	}
	for _, term := range terms.wait(t, 5)[3:] {
		if term <= before[0] {
			t.Errorf("term %d came after term %d; want a higher one", term, before[0])
		}
	}
	if letters := deadLetters(t, s); len(letters) > 0 {
		t.Errorf("got dead letters %+v; want none", letters)
	}
}

func TestLead(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	a, b := newService(t, srv, "risk"), newService(t, srv, "risk")
	never := func(context.Context, uint64) error { t.Error("Lead called the function"); return nil }
	fails(t, a.Lead(t.Context(), "no group", brisk, never), aegis.ErrInvalid, "no group")
	fails(t, a.Lead(t.Context(), "g", aegis.FailoverPolicy{}, never), aegis.ErrInvalid, "Lease")
	fails(t, a.Lead(t.Context(), "g", brisk, nil), aegis.ErrInvalid, "nil")
	tooLong := brisk
	tooLong.Lease = 25 * time.Hour // other instances would take the key for invalid
	fails(t, a.Lead(t.Context(), "g", tooLong, never), aegis.ErrInvalid, "24h")
	exclusive := newService(t, srv, "risk")
	handle(t, exclusive, "m", echo, aegis.Exclusive())
	fails(t, exclusive.Lead(t.Context(), "default", brisk, never), aegis.ErrInvalid, "exclusive")
	_, err := aegis.New("risk", aegis.WithURL(srv.ClientURL()), aegis.WithFailover(aegis.FailoverPolicy{Lease: 1, Valid: 2, Renew: 1, Timeout: 1}))
	fails(t, err, aegis.ErrInvalid, "WithFailover")
	promptly(t, func() {
		fails(t, newService(t, startServer(t), "risk").Lead(t.Context(), "g", brisk, never), aegis.ErrUnavailable, "JetStream")
	})

	// The instances campaign for two groups at once. Each group has a leader of its own.
	var campaigns sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for _, group := range []string{"scheduler", "reaper"} {
		var active, calls atomic.Int32
		for _, s := range []*aegis.Service{a, b} {
			campaigns.Go(func() {
				err := s.Lead(ctx, group, brisk, func(ctx context.Context, term uint64) error {
					if active.Add(1) > 1 || term == 0 {
						t.Errorf("%d instances lead the group %s, in term %d", active.Load(), group, term)
					}
					defer active.Add(-1)
					calls.Add(1)
					<-ctx.Done()
					return errors.New("Lead must not return this error")
				})
				if !errors.Is(err, aegis.ErrCanceled) || !errors.Is(err, context.Canceled) {
					t.Errorf("Lead returned %v; want ErrCanceled", err)
				}
			})
		}
		eventually(t, "the group "+group+" has a leader", func() bool { return calls.Load() > 0 })
	}
	if a.IsLeader() || b.IsLeader() {
		t.Error("IsLeader reports true, but the instances lead other groups than default")
	}
	cancel()
	campaigns.Wait()

	// When fn returns while it leads, Lead returns fn's error and releases the lease, so that another instance can take it at once.
	errOfFn := errors.New("mine")
	if err := a.Lead(t.Context(), "g", brisk, func(context.Context, uint64) error { return errOfFn }); err != errOfFn {
		t.Errorf("Lead returned %v; want the error of fn", err)
	}
	begin := time.Now()
	if err := b.Lead(t.Context(), "g", aegis.Conservative, func(context.Context, uint64) error { return nil }); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > aegis.Conservative.Lease/2 {
		t.Errorf("it took %v to take a lease that was released", took)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	fails(t, b.Lead(ctx, "another", brisk, never), aegis.ErrTimeout)

	// Stop ends the leadership and waits until fn has returned.
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
		t.Error("Stop returned before the function that led")
	}
	fails(t, <-result, aegis.ErrClosed, "risk")
	fails(t, a.Lead(t.Context(), "g", brisk, never), aegis.ErrClosed)
	begin = time.Now()
	if err := b.Lead(t.Context(), "g", aegis.Conservative, func(context.Context, uint64) error { return nil }); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > aegis.Conservative.Lease/2 {
		t.Errorf("it took %v to take the lease of an instance that was stopped", took)
	}
}

// TestLeaderBehindPartition cuts the leader off, in one direction or in both. It stops leading before the next leader begins, and
// there is still only one leader after the partition has healed.
func TestLeaderBehindPartition(t *testing.T) {
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
			leader := c.leader(t)
			for range 2 {
				proxies[leader].hold(ways...)
				next := c.leader(t, leader)
				if leader.IsLeader() {
					t.Error("the former leader still leads beside the next one")
				}
				proxies[leader].heal()
				time.Sleep(brisk.Lease / 4) // gives the delayed messages time to arrive
				leader = next
			}
			eventually(t, "a second term begins", func() bool { return c.elected.Load() >= 2 })
			c.finish(t)
		})
	}
}

// TestRenewalWithLostAcknowledgement drops the server's acknowledgement of a renewal that was stored. The leader finds out that
// its renewal was stored, and continues in the same term.
func TestRenewalWithLostAcknowledgement(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	p := startProxy(t, srv)
	reconnect := aegis.WithNATS(nats.CustomReconnectDelay(func(int) time.Duration { return 5 * time.Millisecond }))
	s := newService(t, srv, "risk", aegis.WithURL("nats://"+p.address), reconnect)
	longLease := aegis.FailoverPolicy{Lease: 15 * time.Second, Valid: 12 * time.Second, Renew: 100 * time.Millisecond, Timeout: 200 * time.Millisecond}
	// The first election in a new bucket waits for a whole lease. seed gets that over with, under a policy with a short lease.
	seed := newService(t, srv, "risk")
	if err := seed.Lead(t.Context(), "default", brisk, func(context.Context, uint64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	c := compete(t, longLease, s)
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
		// If the revision does not change, hold has caught the acknowledgement of the renewal before.
		for end := time.Now().Add(time.Second); revision() == was && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(longLease.Timeout) // until the leader gives up waiting for the acknowledgement
		p.cut()
		p.heal()
		was = revision()
		eventually(t, "the leader renews its lease again", func() bool { return revision() > was+1 })
	}
	if !s.IsLeader() {
		t.Error("the leader lost its leadership")
	}
	if c.finish(t); c.elected.Load() != 1 {
		t.Errorf("%d terms began; want 1", c.elected.Load())
	}
}

// TestLeaderKeyLostOrCorrupted removes or overwrites the leader's key. There is still only one leader at a time, and terms rise.
func TestLeaderKeyLostOrCorrupted(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(t *testing.T, js jetstream.JetStream){
		"purged":  func(t *testing.T, js jetstream.JetStream) { removeLeaderKey(t, js, jetstream.KeyValue.Purge) },
		"deleted": func(t *testing.T, js jetstream.JetStream) { removeLeaderKey(t, js, jetstream.KeyValue.Delete) },
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
				damage(t, manage(t, srv))
				eventually(t, "the leader has lost its leadership", func() bool { return !leader.IsLeader() || len(c.reigns.all()) > n })
				c.leader(t)
			}
			eventually(t, "a third term begins", func() bool { return c.elected.Load() >= 3 })
			c.finish(t)
		})
	}
}

// removeLeaderKey removes the key of the leader of risk by remove, which is Purge or Delete.
func removeLeaderKey(t *testing.T, js jetstream.JetStream, remove func(jetstream.KeyValue, context.Context, string, ...jetstream.KVDeleteOpt) error) {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), "aegis_leaders")
	if err == nil {
		err = remove(kv, t.Context(), "risk.default")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestElectionAcrossServerRestarts(t *testing.T) {
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
		eventually(t, "nobody leads without the server", func() bool { return !slices.ContainsFunc(c.members, (*aegis.Service).IsLeader) })
		srv = startServer(t, samePort, store)
		c.leader(t)
	}
	eventually(t, "a third term begins", func() bool { return c.elected.Load() >= 3 })
	c.finish(t)
}

// TestElectionInCluster shuts down both followers of the stream leader, one after the other. The leadership survives the loss of
// the first; without a quorum, nobody leads.
func TestElectionInCluster(t *testing.T) {
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
	eventually(t, "the bucket's stream has a leader", func() bool { return slices.ContainsFunc(servers, leads) })

	// One follower is lost: nothing changes.
	before := len(c.reigns.all())
	follower := slices.IndexFunc(servers, func(s *server.Server) bool { return !leads(s) })
	servers[follower].Shutdown()
	for end := time.Now().Add(2 * aegis.Balanced.Lease); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if n := slices.IndexFunc(members, (*aegis.Service).IsLeader); n < 0 {
			t.Fatal("nobody leads after one follower was shut down")
		}
	}
	if n := len(c.reigns.all()); n != before {
		t.Errorf("%d reigns ended when a follower was shut down; want none", n-before)
	}

	// The other follower is lost too: there is no quorum, so nobody leads.
	leader := slices.IndexFunc(servers, leads)
	other := 3 - follower - leader
	servers[other].Shutdown()
	eventually(t, "nobody leads without a quorum", func() bool { return !slices.ContainsFunc(members, (*aegis.Service).IsLeader) })
	for end := time.Now().Add(2 * aegis.Balanced.Lease); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if slices.ContainsFunc(members, (*aegis.Service).IsLeader) {
			t.Fatal("an instance leads without a quorum")
		}
	}
	c.finish(t)
}

// TestElectionAfterLossOfStreamLeader shuts down the server that leads the bucket's stream. Nobody leads until the cluster has
// another stream leader; then there is one leader again.
func TestElectionAfterLossOfStreamLeader(t *testing.T) {
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
	eventually(t, "the bucket's stream has a leader", func() bool { i = slices.IndexFunc(servers, leads); return i >= 0 })
	n := len(c.reigns.all())
	servers[i].Shutdown()
	servers[i].WaitForShutdown()
	eventually(t, "the bucket's stream has another leader", func() bool { return slices.ContainsFunc(servers, leads) })
	c.leader(t)
	if got := len(c.reigns.all()) - n; got > 1 {
		t.Errorf("%d reigns ended; want at most 1", got)
	}
	c.finish(t)
}

// startLeader starts a child process that campaigns with the named policy. It records the reigns that the child prints; all other
// lines go to the channel told of the process.
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
		tb.Fatal("the child process is not ready after 20 s")
	}
	return p
}

// TestFailover measures the time from a kill -9 of the leader to the first answer of the next leader. The caller uses Sticky and
// Idempotent, and sees no error. Callers that use only Sticky lose only calls that may have run.
func TestFailover(t *testing.T) { // not parallel to other tests, because it measures time
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
			var lost atomic.Int32 // counts failed calls that may have run
			var answered [4]atomic.Int32
			done := make(chan struct{})
			var callers sync.WaitGroup
			for i := range 4 { // callers with an even number use only Sticky, the others Idempotent too
				callers.Go(func() {
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
								t.Errorf("a caller with %d options got %v", len(opts), err)
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
				for i := range answered { // otherwise a caller might wait through two failovers in a row
					n := answered[i].Load()
					eventually(t, "each caller gets an answer", func() bool { return answered[i].Load() > n })
				}
				leader := children[pid(id)]
				begin := time.Now()
				if err := leader.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				var next uint64
				next, id, err = ask(aegis.Sticky(), aegis.Idempotent())
				for err == nil && next == term { // the leader had answered before it was killed
					next, id, err = ask(aegis.Sticky(), aegis.Idempotent())
				}
				took = append(took, time.Since(begin))
				if next < term {
					t.Errorf("term %d came after term %d; terms must not fall", next, term)
				}
				term = next
				add()
			}
			close(done)
			callers.Wait()
			if n := int(lost.Load()); n > 2*kills { // two callers use only Sticky, with one call in flight each
				t.Errorf("%d calls were lost in %d kills; want at most %d", n, kills, 2*kills)
			}
			slices.Sort(took)
			if took[0] < want.from || took[len(took)-1] > want.to {
				t.Errorf("failovers took %v; want %v to %v", took, want.from, want.to)
			}
			t.Logf("%d kills: %v to %v, median %v", len(took), took[0], took[len(took)-1], took[len(took)/2])
			for _, p := range children {
				_ = p.input.Close() // stops the child, unless it was killed
				for range p.told {
				}
			}
			checkReigns(t, reigns.all())
		})
	}
}

// TestPausedLeader pauses the leader for longer than its lease, so that another instance takes over. When the former leader
// resumes, it answers ErrNotActive, and a store that checks terms rejects its pending write.
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
			_, err := aegis.Call[int, string](ctx, client, "risk", "write", 1, aegis.ToInstance(id)) // a Sticky one would not wait so long
			writing <- err
		}()
		if line := <-leader.told; line != "writing" {
			t.Fatal(line)
		}
		if err := leader.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		next, other := who()
		for next == term { // the leader answered before SIGSTOP took effect
			next, other = who()
		}
		if next < term || other == id {
			t.Errorf("term %d of %s came after term %d of %s; want a higher one of another instance", next, other, term, id)
		}
		if _, err := call[uint64, string](client, "store", "write", next); err != nil {
			t.Error(err)
		}
		if err := leader.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the former leader knows who leads", func() bool {
			_, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance(id))
			return fails(t, err, aegis.ErrNotActive).Details["leader"] == other
		})
		if line := <-leader.told; !strings.Contains(line, refused.Error()) {
			t.Errorf("the former leader printed %q; want the store's error", line)
		}
		if e := fails(t, <-writing, aegis.ErrFenced, refused.Error()); e.NotRun {
			t.Error("NotRun is true for a call that ran")
		}
	}
	for _, p := range []*process{a, b} {
		_ = p.input.Close()
		for range p.told {
		}
	}
	checkReigns(t, reigns.all())
}

// If the bucket of the leaders is lost, a caller may go on addressing the former leader. Its answer names the new one, and corrects
// the caller's copy.
func TestStickyCallerWithStaleLeader(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "client")
	instances := map[string]*aegis.Service{}
	for _, id := range []string{"a", "b", "c", "d"} {
		s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithFailover(brisk))
		handle(t, s, "who", func(context.Context, int) (string, error) { return id, nil }, aegis.Exclusive())
		start(t, s)
		instances[id] = s
	}
	leader := func() (leader string) {
		eventually(t, "an instance leads", func() bool {
			for id, s := range instances {
				if s.IsLeader() {
					leader = id
				}
			}
			return leader != ""
		})
		return leader
	}
	former := leader()
	ask := func() (string, error) { return call[int, string](client, "risk", "who", 1, aegis.Sticky()) }
	if who, err := ask(); who != former || err != nil {
		t.Fatal(who, err)
	}
	next := former
	for next == former { // by chance it may win again
		if err := manage(t, srv).DeleteKeyValue(t.Context(), "aegis_leaders"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the leader has lost its leadership", func() bool { return !instances[former].IsLeader() })
		next = leader()
	}
	eventually(t, "the former leader knows who leads", func() bool {
		_, err := call[int, string](client, "risk", "who", 1, aegis.ToInstance(former))
		return fails(t, err, aegis.ErrNotActive).Details["leader"] == next
	})
	refusals := func() uint64 { return endpointStats(t, instances[former], "rpc", "who").Codes["NOT_ACTIVE"] }
	before := refusals()
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if who, err := ask(); who != next || err != nil {
			t.Fatal(who, err)
		}
	}
	if n := refusals() - before; n > 3 {
		t.Errorf("the former leader was addressed %d times, want at most 3", n)
	}
}

// A leader that is killed can't answer any more. A call in flight to it fails as soon as another instance leads. If it is
// idempotent, it is sent to that instance.
func TestStickyCallInFlightWhenLeaderIsKilled(t *testing.T) {
	t.Parallel()
	for _, idempotent := range []bool{false, true} {
		t.Run(fmt.Sprint("idempotent=", idempotent), func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, withJetStream(t))
			var reigns journal[reignOf]
			child := startLeader(t, srv, "Aggressive", &reigns)
			client := newService(t, srv, "client")
			if _, err := call[int, string](client, "risk", "who", 1, aegis.Sticky()); err != nil {
				t.Fatal(err)
			}
			next := newService(t, srv, "risk", aegis.WithID("next"), aegis.WithFailover(aegis.Aggressive))
			handle(t, next, "write", func(context.Context, int) (string, error) { return "next", nil }, aegis.Exclusive())
			start(t, next)
			type result struct {
				answer string
				err    error
				at     time.Time
			}
			done := make(chan result)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				opts := []aegis.CallOption{aegis.Sticky()}
				if idempotent {
					opts = append(opts, aegis.Idempotent(), aegis.Retry(aegis.RetryPolicy{AttemptTimeout: 20 * time.Second}))
				}
				answer, err := aegis.Call[int, string](ctx, client, "risk", "write", 1, opts...)
				done <- result{answer, err, time.Now()}
			}()
			if line := <-child.told; line != "writing" {
				t.Fatal(line)
			}
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the next instance leads", next.IsLeader)
			leads := time.Now()
			r := <-done
			if took := r.at.Sub(leads); took > 2*time.Second {
				t.Errorf("the call ended %v after the next leader was elected, want at once", took)
			}
			if idempotent {
				if r.answer != "next" || r.err != nil {
					t.Errorf("got %q and error %v, want the answer of the next leader", r.answer, r.err)
				}
			} else if e := fails(t, r.err, aegis.ErrUnavailable, "next leads now"); e.NotRun {
				t.Error("NotRun is true for a call that ran")
			}
		})
	}
}

// A call that is in flight when its leader hands over gets its answer.
func TestStickyCallInFlightDuringHandOver(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	client := newService(t, srv, "client")
	var inside journal[string]
	add := func(id string) *aegis.Service {
		s := newService(t, srv, "risk", aegis.WithID(id), aegis.WithFailover(brisk))
		handle(t, s, "m", func(context.Context, int) (string, error) {
			inside.add(id)
			time.Sleep(30 * time.Millisecond)
			return id, nil
		}, aegis.Exclusive())
		start(t, s)
		return s
	}
	leader := add("0")
	eventually(t, "the first instance leads", leader.IsLeader)
	for n := 1; n <= 20; n++ {
		next := add(strconv.Itoa(n))
		var calls sync.WaitGroup
		begun := len(inside.all())
		for range 10 {
			calls.Go(func() {
				if got, err := call[int, string](client, "risk", "m", 1, aegis.Sticky()); err != nil {
					t.Errorf("got %q and error %v", got, err)
				}
			})
		}
		inside.wait(t, begun+1)
		if err := leader.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		calls.Wait()
		eventually(t, "the next instance leads", next.IsLeader)
		leader = next
	}
}

// While NATS is away, many candidates together log a few lines, not one each.
func TestElectionLogsWhileServerIsAway(t *testing.T) {
	t.Parallel()
	store := withJetStream(t)
	srv := startServer(t, store)
	var logs safeBuffer
	svc := newService(t, srv, "svc", aegis.WithLogger(slog.New(slog.NewTextHandler(&logs, nil))))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var leading atomic.Int32
	const groups = 100
	for i := range groups {
		go func() {
			_ = svc.Lead(ctx, fmt.Sprint("g", i), aegis.Aggressive, func(ctx context.Context, _ uint64) error {
				leading.Add(1)
				<-ctx.Done()
				leading.Add(-1)
				return ctx.Err()
			})
		}()
	}
	eventually(t, "all groups are led", func() bool { return leading.Load() == groups })
	samePort := onPort(srv)
	srv.Shutdown()
	srv.WaitForShutdown()
	eventually(t, "nobody leads", func() bool { return leading.Load() == 0 })
	time.Sleep(3 * time.Second)
	startServer(t, samePort, store)
	eventually(t, "all groups are led again", func() bool { return leading.Load() == groups })
	if n := strings.Count(logs.String(), "can't be read or written"); n < 1 || n > 3 {
		t.Errorf("%d lines say that leases can't be read or written, want 1 to 3", n)
	}
	eventually(t, "the end is logged", func() bool { return strings.Contains(logs.String(), "can be read and written again") })
}

// The fencing token of a ctx does not change when the handler returns, also if nobody has waited for the ctx.
func TestTermAfterHandlerHasReturned(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk", aegis.WithFailover(brisk))
	kept := make(chan context.Context, 1)
	handle(t, svc, "m", func(ctx context.Context, _ int) (uint64, error) {
		kept <- ctx
		return aegis.Term(ctx), nil
	}, aegis.Exclusive())
	start(t, svc)
	term, err := call[int, uint64](svc, "risk", "m", 1, aegis.Sticky())
	if err != nil {
		t.Fatal(err)
	}
	ctx := <-kept
	<-ctx.Done()
	if now := aegis.Term(ctx); now != term || term == 0 {
		t.Errorf("the term was %d, and is %d after the handler has returned", term, now)
	}
}

// A leader that resigns handles the events that it has asked for, whatever their pattern: giving them back, or leaving them to the ack
// wait, would use up an attempt.
func TestResignUsesUpNoAttempt(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	const n = 5000
	if err := aegis.PublishBatch(t.Context(), newService(t, srv, "shop"), "order", "created", make([]int, n)); err != nil {
		t.Fatal(err)
	}
	patient := aegis.FailoverPolicy{ // so that no lease ends by itself on a busy machine
		Lease: 4 * time.Second, Valid: 3500 * time.Millisecond, Renew: 300 * time.Millisecond, Timeout: 300 * time.Millisecond,
	}
	var handled journal[int] // the attempts
	instances := map[*aegis.Service]bool{}
	for range 4 {
		s := newService(t, srv, "risk", aegis.WithFailover(patient))
		subscribe(t, s, "order.*", func(_ context.Context, e aegis.Event[int]) error {
			time.Sleep(20 * time.Millisecond)
			handled.add(e.Attempt)
			return nil
		}, aegis.Exclusive(), aegis.FromStart(), aegis.Concurrency(64))
		start(t, s)
		instances[s] = true
	}
	for len(instances) > 1 { // each resigns once, but for the last one
		before := len(handled.all())
		var leader *aegis.Service
		eventually(t, "an instance leads and handles events", func() bool {
			for s := range instances {
				if s.IsLeader() {
					leader = s
				}
			}
			return leader != nil && leader.IsLeader() && len(handled.all()) > before+100
		})
		if err := leader.Resign(t.Context()); err != nil {
			t.Fatal(err)
		}
		delete(instances, leader)
	}
	attempts := handled.wait(t, n)
	if again := n - len(slices.DeleteFunc(slices.Clone(attempts), func(attempt int) bool { return attempt > 1 })); again > 0 {
		t.Errorf("%d of %d events came at a later attempt", again, n)
	}
}

// A Resign whose ctx has ended already, at the very beginning of a term, ends the term nevertheless.
func TestResignAtBeginningOfTerm(t *testing.T) {
	t.Parallel()
	srv := startServer(t, withJetStream(t))
	svc := newService(t, srv, "risk", aegis.WithFailover(aegis.FailoverPolicy{
		Lease: 400 * time.Millisecond, Valid: 300 * time.Millisecond, Renew: 60 * time.Millisecond, Timeout: 200 * time.Millisecond,
	}))
	for i := range 8 {
		subscribe(t, svc, fmt.Sprintf("order.t%d", i), into(&journal[int]{}), aegis.Exclusive())
	}
	for i := range 40 {
		handle(t, svc, fmt.Sprintf("m%d", i), echo, aegis.Exclusive())
	}
	start(t, svc)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for round := range 5 {
		eventually(t, "the instance leads", svc.IsLeader)
		time.Sleep(time.Duration(round) * 50 * time.Microsecond)
		term := svc.Stats().Leading["default"]
		_ = svc.Resign(ended)
		eventually(t, "the term ends", func() bool { return !svc.IsLeader() || svc.Stats().Leading["default"] != term })
	}
}
