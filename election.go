package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// This file has the leader election. Of the instances that campaign for the leadership of a group, one leads. It holds a lease,
// which is a key of the bucket aegis_leaders.
//
// There are never two leaders at once, because a leader stops before another instance can begin:
//
//   - The leader renews its lease by a compare-and-swap on the key. It may act for the time Valid, which begins when it sends a
//     renewal that is then confirmed. It measures this time with its own monotonic clock.
//   - Another instance takes the lease over by a compare-and-swap on the key, once it has seen the same revision of the key for
//     the time Lease. It measures this time with its own monotonic clock. A renewal that is stored in the meantime makes the
//     compare-and-swap fail.
//   - The other instance can't see a renewal before the leader has sent it, so its Lease begins no earlier than the leader's
//     Valid. And Valid is less than Lease, so the leader's time ends first.
//
// This holds whatever happens to messages, to processes, and to the server and its clock. It has two limits. If the key is lost,
// the guarantee needs instances with the same policy, because an instance that never saw the leader's Lease then waits for its
// own. And on Linux the monotonic clock stands still while a machine is suspended: a leader that was suspended may go on as if no
// time had passed, and then only the term, as a fencing token, shows that it is not the leader any more.
//
// A candidate alternates between two functions: win waits until the lease is free and takes it, and runTerm renews the lease on a
// second goroutine while the leader acts. For the exclusive handlers, the leader acts in serveTerm: the endpoints begin to take
// messages (endpoint.share), and admit checks for each message that the term still holds.
//
// Leases are described in Gray and Cheriton, "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache
// Consistency", SOSP 1989.

// A FailoverPolicy sets how soon another instance replaces a leader that has crashed, hangs or is cut off. It is valid if 24 h
// >= Lease > Valid > Renew > 0 and Timeout > 0. The other instances replace a leader when they have seen no renewal for the
// time Lease. A leader whose renewals fail gives up the leadership by itself after the time Valid. Lease must exceed Valid by
// more than the error of clocks that run at different speeds.
//
// All instances of a service should have the same policy. The reason is that the key of the lease may be deleted, by hand or with
// its bucket. Then an instance that has not seen the Lease of the leader waits for its own Lease instead.
type FailoverPolicy struct {
	Lease   time.Duration // how long another instance must have seen no renewal before it takes over
	Valid   time.Duration // how long the leader may act after it sent the last renewal that was confirmed
	Renew   time.Duration // the interval between renewals
	Timeout time.Duration // how long to wait for the answer to one request to the server
}

// Aggressive, Balanced and Conservative are the predefined policies. After a crash of the leader, another instance leads within
// 0.9 to 1.4 s with Aggressive, within 2.4 to 3.1 s with Balanced, and within 6 to 7.6 s with Conservative, provided that NATS
// accepts writes. A cluster that has lost the server which led the bucket accepts none for some seconds, until it has elected
// another one. During that time no instance leads.
var (
	Aggressive   = FailoverPolicy{Lease: 1200 * ms, Valid: 800 * ms, Renew: 250 * ms, Timeout: 250 * ms}
	Balanced     = FailoverPolicy{Lease: 3000 * ms, Valid: 2200 * ms, Renew: 600 * ms, Timeout: 500 * ms}
	Conservative = FailoverPolicy{Lease: 7500 * ms, Valid: 6000 * ms, Renew: 1500 * ms, Timeout: 1000 * ms}
)

const (
	ms         = time.Millisecond
	maxLease   = 24 * time.Hour
	wantPolicy = "want 24h >= Lease > Valid > Renew > 0 and Timeout > 0, such as aegis.Balanced"

	leadersBucket = "aegis_leaders"
	leadersPrefix = "$KV." + leadersBucket + "."
	defaultGroup  = "default" // the group of the exclusive handlers

	answerGrace = 200 * time.Millisecond // for the last answers of a leader that was replaced
)

func (p FailoverPolicy) valid() bool {
	return p.Lease > p.Valid && p.Valid > p.Renew && p.Renew > 0 && p.Timeout > 0 && p.Lease <= maxLease
}

// A leaseValue is the value of a group's key. No two are equal, because their Nonce and Sent differ.
type leaseValue struct {
	Holder   string        `json:"holder"` // the instance that leads; "" if the value only starts a wait (see take)
	Nonce    string        `json:"nonce"`  // the random one of the candidate that wrote the value
	Term     uint64        `json:"term"`
	Lease    time.Duration `json:"lease"` // in ns
	Sent     time.Duration `json:"sent"`  // by the clock of the process that wrote the value; meaningless to other processes
	Released bool          `json:"released,omitempty"`
}

// leads reports whether c names a leader.
func (c *leaseValue) leads() bool { return c.Holder != "" && !c.Released }

// valid reports whether aegis can have written c.
func (c *leaseValue) valid() bool {
	return c.Nonce != "" && c.Term <= math.MaxInt64 && c.Lease >= 0 && c.Lease <= maxLease
}

// A candidate takes part in the election of a group's leader. Its fields belong to the goroutine that campaigns, except those
// that are atomic. While the candidate leads, the fields from seen on belong to the goroutine that renews the lease.
type candidate struct {
	svc           *Service
	group, key    string
	policy        FailoverPolicy
	nonce         string
	watch         *leaderWatch
	healthChanged chan struct{}        // receives a signal when the service has become healthy or unhealthy
	restUntil     time.Duration        // when the candidate campaigns again after it has resigned, by the clock
	campaigning   atomic.Bool          // whether campaignForExclusive has started the campaign
	term          atomic.Pointer[term] // the latest

	seen         leaseValue    // the latest value of the key that is known
	revision     uint64        // of seen
	since        time.Duration // when seen was first seen, by the clock
	highestTerm  uint64        // of all values that were seen
	longestLease time.Duration // of all values that were seen
	lastConn     *conn         // the connection that was used last; see the method conn
}

// A term is a period of leadership. It is also a ctx, which ends when the lease does.
type term struct {
	context.Context
	number   uint64
	until    atomic.Int64    // when the lease ends, by the clock; 0 once the term is over
	lapse    *time.Timer     // ends the term at that time
	resigned context.Context // ends when the leadership is to be given up because the instance is unhealthy, or Resign was called
	restFor  atomic.Int64    // how long the instance does not campaign after a term that was resigned
	over     chan struct{}   // closed when the leadership was given up

	cancel, resign context.CancelFunc // end the term's ctx, and resigned
}

type termKey struct{}

// holds reports whether t's instance leads at this moment; if t is nil, it does not. The report is exact even in a process that
// was paused, because the clock has gone on meanwhile.
func (t *term) holds() bool { return t != nil && int64(clock()) < t.until.Load() }

// serves reports whether t's instance leads and takes new work. A term that was resigned never does so again.
func (t *term) serves() bool { return t.holds() && t.resigned.Err() == nil }

// extend moves the end of the lease. It reports false if the lease has ended already, because then the term is over.
func (t *term) extend(until time.Duration) bool {
	old := t.until.Load()
	if int64(clock()) >= old || !t.until.CompareAndSwap(old, int64(until)) {
		return false
	}
	t.lapse.Reset(until - clock())
	return true
}

func (t *term) end() {
	t.until.Store(0)
	t.lapse.Stop()
	t.cancel()
}

func (s *Service) newCandidate(group string, p FailoverPolicy) *candidate {
	return &candidate{
		svc: s, group: group, key: s.name + "." + group, policy: p, nonce: rand.Text(), healthChanged: make(chan struct{}, 1),
	}
}

// Lead campaigns for the leadership of a group among the instances of the service, and calls fn each time this instance wins it.
// group is a letter, then letters, digits, - and _, at most 64 characters. term is a number that rises from leader to leader and
// never falls. Lead does not need Start. It blocks until fn returns while this instance leads, until ctx ends, or until Stop
// begins.
//
// No other instance leads the group until fn's ctx ends, because that ctx ends with the leadership. [Term] returns the term for
// that ctx. A process that was paused notices a moment late that it has lost the leadership. Only the term protects against this:
// a store that remembers the highest term can reject the writes of earlier terms.
//
// If fn returns while this instance leads, Lead releases the leadership and returns fn's error. If the leadership is lost, or a
// health check fails, fn's ctx ends, and Lead waits until fn has returned and campaigns again. If ctx ends, fn's ctx ends too,
// and Lead releases the leadership when fn has returned. While the server can't be reached, Lead does not fail, but waits for
// it.
//
// Errors:
//   - that of fn
//   - [ErrCanceled] or [ErrTimeout] if ctx has ended
//   - [ErrClosed] if the service was stopped
//   - [ErrInvalid] if group or p is invalid, if fn is nil, if group is "default" and the service has [Exclusive] handlers, which
//     use that group, or if the bucket aegis_leaders exists but can't be used
//   - [ErrUnavailable] if there is no JetStream
//   - [ErrDenied] if the server's permissions do not allow it
func (s *Service) Lead(ctx context.Context, group string, p FailoverPolicy, fn func(ctx context.Context, term uint64) error) error {
	switch {
	case !isName(group, maxService):
		return newError(ErrInvalid, "Lead: group %q: want a letter, then letters, digits, - and _, at most %d", group, maxService)
	case !p.valid():
		return newError(ErrInvalid, "Lead: %+v: %s", p, wantPolicy)
	case fn == nil:
		return newError(ErrInvalid, "Lead: the function is nil")
	case group == defaultGroup && s.exclusive.Load() != nil:
		return newError(ErrInvalid, "Lead: group %q belongs to the exclusive handlers of %s: choose another", group, s.name)
	}
	stopped := newError(ErrClosed, "Lead: service %s was stopped", s.name)
	c := s.newCandidate(group, p)
	if !c.enter() {
		return stopped
	}
	_, failure := s.openStream(ctx, s.leadersStream(), leadersPrefix+c.key)
	if failure != nil && failure.Code != ErrTimeout.Code && failure.Code != ErrCanceled.Code && s.pick() != nil {
		c.withdraw()
		return failure
	} // otherwise the server may come back while c campaigns
	campaigning, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.quitting, cancel)()
	select {
	case <-s.startHealth():
	case <-campaigning.Done():
	}
	result, done := error(stopped), false
	c.campaign(campaigning, campaigning, func(t *term) {
		s.leading.Add(1)
		defer s.leading.Add(-1)
		ctx, end := context.WithCancel(t)
		defer end()
		defer context.AfterFunc(t.resigned, end)()
		var err error
		s.asHandler(func() { err = fn(ctx, t.number) })
		if ctx.Err() == nil && t.holds() {
			result, done = err, true
			cancel()
		}
	})
	if !done && ctx.Err() != nil {
		return asError(ctx.Err())
	}
	return result
}

// IsLeader reports whether this instance leads the service at this moment, which means the group "default" of the service. The
// report is exact, because IsLeader compares the end of the lease with the clock. It does not block.
func (s *Service) IsLeader() bool { return s.terms()[defaultGroup] != 0 }

// Leader returns the id of the instance that leads the service, which means the group "default" of the service, as far as this
// instance knows. The first call asks the server, and blocks until ctx ends or, if ctx has no deadline, for [WithTimeout]. Later
// calls use a local copy, which is kept up to date until it has not been used for a minute.
//
// Errors:
//   - [ErrNotFound] if no instance leads
//   - [ErrUnavailable] if the first call finds no connection or no JetStream
//   - [ErrOverloaded] if the server's max_subscriptions is reached
//   - [ErrTimeout] or [ErrCanceled] if the first call is not answered before ctx ends or, if ctx has no deadline, within
//     WithTimeout
//   - [ErrDenied] if the server's permissions do not allow it
//   - [ErrClosed] after Stop
func (s *Service) Leader(ctx context.Context) (string, error) { return s.LeaderOf(ctx, s.name) }

// LeaderOf returns the id of the instance that leads another service, as [Service.Leader] does for this one.
//
// Errors:
//   - [ErrInvalid] if the name of the service is invalid
//   - [ErrOverloaded] if more than 1,024 services are looked up at once
//   - those of Leader
func (s *Service) LeaderOf(ctx context.Context, service string) (string, error) {
	switch {
	case !isName(service, maxService):
		return "", notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d",
			service, maxService))
	case service == s.name && s.IsLeader():
		return s.id, nil
	}
	w := s.leaderWatchOf(service)
	if failure := w.wait(ctx); failure != nil {
		return "", failure
	}
	if leader, _ := w.leaderNow(); leader != "" {
		return leader, nil
	}
	return "", newError(ErrNotFound, "no instance leads %s", service)
}

// Resign gives up the leadership of the [Exclusive] handlers. This instance takes no new work for these handlers, and Resign
// waits until those that run have returned. Then another instance leads within milliseconds. If ctx ends before that, the ctx
// of the handlers ends too. This instance campaigns again after the time Lease of its policy.
//
// Errors:
//   - [ErrNotActive] if this instance does not lead
//   - [ErrTimeout] or [ErrCanceled] if ctx has ended before the handlers have returned; the leadership then ends when they
//     return, or with the lease
func (s *Service) Resign(ctx context.Context) error {
	c := s.exclusive.Load()
	if c == nil || !c.term.Load().serves() {
		return newError(ErrNotActive, "Resign: instance %s of %s does not lead", s.id, s.name)
	}
	t := c.term.Load()
	t.restFor.Store(int64(c.policy.Lease))
	t.resign()
	select {
	case <-t.over:
		return nil
	case <-ctx.Done():
		t.cancel()
		return newError(asError(ctx.Err()), "Resign: exclusive handlers of %s still run; their ctx has ended", s.name)
	}
}

// Term returns the term of the leadership to which ctx belongs, if ctx is that of an [Exclusive] handler or of a function of
// [Service.Lead], or is derived from one. For any other ctx it returns 0.
func Term(ctx context.Context) uint64 {
	t, _ := ctx.Value(termKey{}).(*term)
	return cmp.Or(t, &term{}).number
}

// leaderOf returns the id of the instance that leads a service, or "" if no leader is known. It blocks only until it is known for
// the first time who leads, and at most for a second.
func (s *Service) leaderOf(ctx context.Context, service string) string {
	w := s.leaderWatchOf(service)
	if !w.ready.Load() {
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		defer cancel()
		_ = w.wait(ctx) // if this fails, w has no entry
	}
	return w.lastLeader()
}

// A leaderWatch is the local copy of a group's key.
type leaderWatch struct {
	*watch[leaseValue]
	correction atomic.Pointer[correction]
}

// A correction says who leads according to another instance, as long as the copy stays at a revision.
type correction struct {
	leader   string
	revision uint64
}

// leaderWatchOf returns the watch of the key that says who leads a service.
func (s *Service) leaderWatchOf(service string) *leaderWatch {
	return s.elections.get(service + "." + defaultGroup)
}

func (s *Service) newLeaderWatch(key string) *leaderWatch {
	return &leaderWatch{watch: newWatch(s, leadersBucket, key, func(_ string, c *leaseValue) bool { return c.valid() }, nil)}
}

// leaderNow returns the id of the instance that leads, or "" if none does as far as is known, and when its lease ends unless it
// is renewed, by the clock. This instance is returned only if it leads at this moment: the key may still name one with the same
// id that was killed.
func (w *leaderWatch) leaderNow() (id string, until time.Duration) {
	e, _ := w.get(w.filter)
	until = e.seen + e.value.Lease
	formerly := w.filter == w.svc.name+"."+defaultGroup && e.value.Holder == w.svc.id && !w.svc.IsLeader()
	if !e.value.leads() || clock() >= until || formerly {
		return "", 0
	}
	return e.value.Holder, until
}

// lastLeader returns the id of the instance that was the last to take the lease, or that another instance has named since, or
// "" if none is known. Unlike leaderNow it does not check whether the lease has ended: a call that is sent there finds out.
func (w *leaderWatch) lastLeader() string {
	e, _ := w.get(w.filter)
	if c := w.correction.Load(); c != nil && c.revision == e.revision {
		return c.leader
	}
	if e.value.leads() {
		return e.value.Holder
	}
	return ""
}

// correct takes the answer of the instance asked, which does not lead. If the answer names another leader, and the copy still
// names asked, the copy is out of date, because its bucket was lost for example. Then the answer counts until the copy is
// filled anew.
func (w *leaderWatch) correct(asked string, notActive *Error) {
	leader := notActive.Details["leader"]
	if leader != asked && isToken(leader, maxInstance) && w.lastLeader() == asked {
		e, _ := w.get(w.filter)
		w.correction.Store(&correction{leader, e.revision})
		signal(w.refill)
	}
}

// An expectedTerm is the term in which a call was sent to the leader. superseded reports when another term has begun. A nil
// expectedTerm never ends.
type expectedTerm struct {
	*leaderWatch
	instance string
	term     uint64
	ending   bool // whether another instance leads
}

// termOf returns the latest term, in which instance leads as far as is known here.
func (w *leaderWatch) termOf(instance string) *expectedTerm {
	e, _ := w.get(w.filter)
	return &expectedTerm{leaderWatch: w, instance: instance, term: e.value.Term}
}

// nextChange returns a channel that receives something when superseded has to be called. It is nil if l is nil.
func (l *expectedTerm) nextChange() <-chan struct{} {
	if l == nil {
		return nil
	}
	return l.leaderWatch.nextChange()
}

// superseded returns an error if another instance has begun a term, because then the answer to a call can't come any more. It
// waits for a moment before, because an answer that was sent at the end of the old term may still be on its way. Otherwise
// superseded returns the channel that receives something when it has to be called again.
func (l *expectedTerm) superseded() (*Error, <-chan struct{}) {
	changed := l.nextChange() // before get, so that no change is missed
	e, _ := l.get(l.filter)
	switch {
	case e.value.Term <= l.term || e.value.Holder == "" || e.value.Holder == l.instance:
		return nil, changed
	case l.ending:
		return newError(ErrUnavailable, "%s leads now instead of %s", e.value.Holder, l.instance), nil
	}
	l.ending = true
	grace := make(chan struct{})
	time.AfterFunc(answerGrace, func() { close(grace) })
	return nil, grace
}

func (s *Service) leadersStream() jetstream.StreamConfig {
	config := s.bucket(leadersBucket)
	config.FirstSeq = uint64(time.Now().UnixMilli()) // so that no revision occurs twice, even if the bucket is lost
	return config
}

// enter adds c to the service's candidates and makes Stop wait for withdraw, which campaign calls at its end. It has to be called
// before campaign. It reports false if the service was stopped already; then neither of the two may be called.
func (c *candidate) enter() bool {
	return c.svc.unlessStopping(func() {
		c.svc.candidates[c] = true
		c.svc.campaigns.Add(1)
	})
}

func (c *candidate) withdraw() {
	c.svc.leaseLog.note(c, nil)
	if c.watch != nil {
		c.watch.use.release()
	}
	c.svc.mu.Lock()
	delete(c.svc.candidates, c)
	c.svc.mu.Unlock()
	c.svc.campaigns.Done()
}

// campaign calls lead each time the candidate is elected, until ctx ends. The leadership ends when lead returns. The term that
// lead gets is a child of parent.
func (c *candidate) campaign(ctx, parent context.Context, lead func(*term)) {
	defer c.withdraw()
	c.watch = c.svc.elections.hold(c.key)
	for ctx.Err() == nil {
		if t := c.win(ctx, parent); t != nil {
			c.runTerm(ctx, t, lead)
		}
	}
}

// win waits until the lease is free, takes it, and returns the new term. It returns nil if ctx ends before that. An unhealthy
// instance does not take the lease.
func (c *candidate) win(ctx, parent context.Context) *term {
	for failures := 0; ; {
		changed := c.watch.nextChange()
		if e, ok := c.watch.get(c.key); ok && e.revision > c.revision {
			c.observe(e.value, e.revision)
		}
		wait, rest := c.untilFree(), c.restUntil-clock()
		switch {
		case rest > 0:
			wait = rest
		case c.svc.unhealthy.Load():
			wait = c.policy.Lease // a signal of healthChanged ends the wait
		case wait <= 0:
			t, failure := c.take(parent)
			if failure != nil && failure.Code == errConflict.Code {
				failure = nil // another candidate was faster
			}
			c.svc.leaseLog.note(c, failure)
			switch {
			case t != nil:
				return t
			case failure == nil: // the lease is not free, or a wait has begun
				failures, wait = 0, c.untilFree()
			default:
				failures++
				wait = backoff(failures, c.policy.Timeout/8, c.policy.Timeout)
			}
		}
		select {
		case <-changed:
		case <-c.healthChanged:
		case <-time.After(max(wait, time.Millisecond)):
		case <-ctx.Done():
			return nil
		}
	}
}

// A leaseLog writes the log lines about leases that can't be read or written: one when that begins, one each minute, and one
// when it has ended for all candidates.
type leaseLog struct {
	mu      sync.Mutex          // guards the rest
	failing map[*candidate]bool // those whose latest attempt has failed
	count   int                 // failures since the last line
	next    time.Duration       // when there may be another line, by the clock
}

// note takes the result of an attempt of c.
func (t *leaseLog) note(c *candidate, failure *Error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := len(t.failing)
	if failure == nil {
		if delete(t.failing, c); before > 0 && len(t.failing) == 0 {
			c.svc.log.Info("the leaders' leases can be read and written again")
		}
		return
	}
	if t.failing == nil {
		t.failing = map[*candidate]bool{}
	}
	t.failing[c] = true
	if t.count++; before == 0 || clock() >= t.next {
		c.svc.log.Warn("the leaders' leases can't be read or written",
			"group", c.group, "error", failure, "groups", len(t.failing), "failures", t.count)
		t.count, t.next = 0, clock()+time.Minute
	}
}

// untilFree returns how long it takes at most until the lease is free. If the result is not positive, the lease is free now.
func (c *candidate) untilFree() time.Duration {
	if c.seen.Nonce == "" || c.seen.Released {
		return 0
	}
	lease := cmp.Or(c.seen.Lease, c.policy.Lease)
	if c.seen.Holder == "" { // an unknown leader may still hold a lease, as long as the longest
		lease = max(lease, c.longestLease)
	}
	return c.since + lease - clock()
}

// observe notes what the key holds. The wait for the lease starts anew only if the key has changed.
func (c *candidate) observe(now leaseValue, revision uint64) {
	if revision != c.revision || now != c.seen {
		c.seen, c.revision, c.since = now, revision, clock()
	}
	c.highestTerm, c.longestLease = max(c.highestTerm, now.Term), max(c.longestLease, now.Lease)
}

// take takes the lease if it is free, and returns the term that begins. It reads the key first, because the value that was seen
// last may be out of date. It returns neither a term nor a failure if the lease turns out not to be free.
func (c *candidate) take(parent context.Context) (*term, *Error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.policy.Timeout)
	data, revision, failure := c.svc.readKey(ctx, c.conn(), leadersBucket, c.key)
	cancel()
	if failure != nil {
		c.lastConn = c.svc.pickOther(c.lastConn)
		return nil, failure
	}
	if data == nil {
		// The key was deleted, or its bucket was lost, and the instance that held it may lead until its lease ends. Therefore write a
		// value without a holder, so that all candidates see a revision from which they wait for the longest lease that is known. If
		// the key is lost once more, its next value has another revision.
		c.revision = revision
		_, failure := c.put(leaseValue{Term: c.highestTerm, Lease: max(c.longestLease, c.policy.Lease)})
		return nil, failure
	}
	if now := parseLease(data); now != c.seen || revision != c.revision {
		c.observe(now, revision)
		signal(c.watch.refill) // the watch has missed a change
	}
	if c.untilFree() > 0 {
		return nil, nil
	}
	number := max(c.highestTerm+1, uint64(time.Now().UnixMilli()))
	sent, failure := c.put(leaseValue{Holder: c.svc.id, Term: number, Lease: c.policy.Lease})
	if failure != nil {
		return nil, failure
	}
	t := newTerm(parent, number, sent+c.policy.Valid)
	c.term.Store(t)
	return t, nil
}

// newTerm returns a term that ends at the time until, by the clock, unless it is extended. It is a child of parent.
func newTerm(parent context.Context, number uint64, until time.Duration) *term {
	t := &term{number: number, over: make(chan struct{})}
	t.Context, t.cancel = context.WithCancel(context.WithValue(parent, termKey{}, t))
	t.resigned, t.resign = context.WithCancel(context.Background())
	t.until.Store(int64(until))
	t.lapse = time.AfterFunc(time.Hour, func() { // Reset sets the true time, when t.lapse is set, which end needs
		if !t.holds() { // otherwise the lease was extended at the last moment
			t.end()
		}
	})
	t.lapse.Reset(until - clock())
	return t
}

// runTerm calls lead and renews the lease until lead returns. If ctx has ended already, it does not call lead. Afterwards it
// releases the lease, unless the lease has ended by itself or exclusive handlers still run.
func (c *candidate) runTerm(ctx context.Context, t *term, lead func(*term)) {
	c.svc.log.Info("elected leader", "group", c.group, "term", t.number)
	stop := make(chan struct{})
	renewed := closedAfter(func() { c.renew(t, stop) })
	defer func() { // also if lead panics
		close(stop)
		<-renewed
		released := t.holds()
		t.end()
		t.resign()
		c.restUntil = clock() + time.Duration(t.restFor.Load())
		c.svc.statusChanged() // before the release, so that the next leader does not take messages beside this instance
		// If exclusive handlers still run, the next leader has to wait until the lease ends.
		if released = released && !(c == c.svc.exclusive.Load() && c.svc.exclusiveBusy()); released {
			c.release(t)
		}
		c.svc.log.Info("the leadership has ended", "group", c.group, "term", t.number, "released", released)
		close(t.over)
	}()
	if ctx.Err() == nil {
		lead(t)
	}
}

// renew renews the lease until stop is closed, the lease is lost, or the instance is unhealthy. When renew has returned, the
// lease ends by itself, unless runTerm releases it before.
func (c *candidate) renew(t *term, stop <-chan struct{}) {
	due := c.seen.Sent + c.policy.Renew
	for {
		select {
		case <-time.After(due - clock()):
		case <-c.healthChanged:
		case <-stop:
			return
		}
		switch {
		case !t.holds(): // the process may have been paused
			t.end()
			return
		case c.svc.unhealthy.Load():
			t.restFor.CompareAndSwap(0, int64(c.policy.Renew)) // enough for another instance to take over
			t.resign()
			return
		}
		sent, failure := c.put(leaseValue{Holder: c.svc.id, Term: t.number, Lease: c.policy.Lease})
		switch {
		case failure == nil && t.extend(sent+c.policy.Valid):
			due = sent + c.policy.Renew
		case !t.holds(), failure.Code == errConflict.Code: // if failure is nil, extend has found that t no longer holds
			c.svc.log.Warn("the leadership was lost", "group", c.group, "term", t.number, "error", failure)
			t.end()
			return
		default:
			due = clock() + c.policy.Renew/5
		}
	}
}

// release marks the lease as released, so that the next leader can begin at once.
func (c *candidate) release(t *term) {
	for range 2 { // a renewal that renew gave up may have been stored in between
		_, failure := c.put(leaseValue{Holder: c.svc.id, Term: t.number, Lease: c.policy.Lease, Released: true})
		if failure == nil || failure.Code != errConflict.Code || c.seen.Nonce != c.nonce {
			return
		}
	}
}

// put replaces the value that was seen last by next. It returns the time, by the clock, at which the value that the key then
// holds was sent. This time may be before the call of put, because an earlier put of the same value may have been stored without
// a confirmation. The failure is a conflict if the key holds another value.
func (c *candidate) put(next leaseValue) (sent time.Duration, failure *Error) {
	next.Nonce, next.Sent = c.nonce, clock()
	data, _ := json.Marshal(next)                                                // can't fail, because it is strings and numbers
	ctx, cancel := context.WithTimeout(context.Background(), 2*c.policy.Timeout) // one to store it, one to read it back
	defer cancel()
	x := &exchange{subject: leadersPrefix + c.key, data: data, until: next.Sent + c.policy.Timeout, on: c.conn()}
	value, revision, failure := c.svc.compareAndSwap(ctx, x, c.svc.leadersStream(), c.revision)
	c.lastConn = x.on
	if failure != nil && failure.Code != errConflict.Code {
		return 0, failure
	}
	now := parseLease(value)
	c.observe(now, revision)
	sent, now.Sent = now.Sent, next.Sent // compare all but Sent: an earlier put of the same value may be the one that was stored
	if now != next {
		return 0, failure
	}
	return sent, nil
}

// conn returns the connection that was used last, as long as it is up. put and take set another one when a request on it fails,
// because it takes nats.go some time to notice that a connection hangs.
func (c *candidate) conn() *conn {
	if c.lastConn == nil || !c.lastConn.up.Load() {
		c.lastConn = c.svc.pick()
	}
	return c.lastConn
}

// parseLease decodes the value of a key. For a value that is not from aegis it returns that of an unknown candidate.
func parseLease(data []byte) (c leaseValue) {
	if len(data) > 0 && (json.Unmarshal(data, &c) != nil || !c.valid()) {
		c = leaseValue{Nonce: "?"}
	}
	return c
}

// The exclusive handlers.

// campaignForExclusive starts the campaign for the leadership of the service, which goes on until Stop. It has to be called after
// the exclusive handlers were opened. It does nothing if there are none, or if the campaign was started before.
func (s *Service) campaignForExclusive(ctx context.Context) error {
	c := s.exclusive.Load()
	if c == nil || c.campaigning.Load() {
		return nil
	}
	if _, failure := s.openStream(ctx, s.leadersStream(), leadersPrefix+c.key); failure != nil {
		return failure
	}
	s.probePublish(leadersPrefix+c.key, readSubject(leadersBucket))
	s.leaderOf(ctx, s.name) // so that notActive knows the leader from the start, if it can be known
	if c.campaigning.CompareAndSwap(false, true) && c.enter() {
		go c.campaign(s.quitting, s.base, s.serveTerm)
	}
	return nil
}

// serveTerm serves the exclusive handlers for a term. It returns when the lease ends. If the service stops or is unhealthy, or
// Resign was called, it returns when the messages that have arrived or were asked for are handled.
func (s *Service) serveTerm(t *term) {
	s.statusChanged()
	select {
	case <-t.Done():
	case <-s.quitting.Done():
	case <-t.resigned.Done():
	}
	if t.resigned.Err() != nil { // also if t's ctx has ended, because the ctx of Resign has
		s.shareAll()
		_ = s.flush(t) // if this fails, a request that is on its way may be answered with ErrNotActive
	}
	for t.holds() && s.exclusiveBusy() { // t's ctx may have ended before the lease, because Stop's time is up
		time.Sleep(time.Millisecond)
	}
}

// exclusiveBusy reports whether exclusive handlers are running or may still be started.
func (s *Service) exclusiveBusy() bool {
	return slices.ContainsFunc(s.allEndpoints(), func(e *endpoint) bool {
		// Once Stop has begun, only finished says that no other handler will start.
		return e.candidate != nil && !isClosed(e.finished) && (s.quitting.Err() != nil || e.source.busy())
	})
}

// notActive returns the error with which an instance that does not lead answers. It does not block: it names the leader only if
// this instance knows it already.
func (c *candidate) notActive() *Error {
	e := notRun(newError(ErrNotActive, "instance %s of %s stands by", c.svc.id, c.svc.name))
	e.Source = c.svc.name
	if leader := c.svc.leaderOf(endedContext, c.svc.name); leader != "" && leader != c.svc.id {
		e.Message += ": " + leader + " leads"
		e.Details = map[string]string{"leader": leader}
	}
	return e
}
