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

// This file is leader election: of the instances that campaign for a group one leads, by a lease on a key of the bucket
// aegis_leaders.
//
// The leader renews the key by compare-and-swap, and may act until Valid after it sent the last renewal that was confirmed, by its
// own monotonic clock. Another one takes over by compare-and-swap, when it has seen the same revision of the key for Lease, by its
// own clock too. It can't see a renewal before it was sent, and Valid is less than Lease: so no two lead at once, whatever becomes
// of messages, processes, and the server and its clock. (If the key is lost, that takes policies that are the same. On Linux that
// clock stands still while a machine is suspended: then the term alone tells a former leader. Leases as such: Gray and Cheriton,
// "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache Consistency", SOSP 1989.)

// A FailoverPolicy says how soon a leader that crashed, hangs or is cut off is replaced. Lease > Valid > Renew > 0, Timeout > 0, and
// Lease is at most 24 h. The others wait for Lease until they replace a leader of whom they hear nothing; a leader whose renewals
// fail stops by itself after Valid. What lies between the two has to make up for clocks that run at different speeds.
//
// All instances of a service should have the same policy: where the key of the lease was deleted, by hand or with its bucket, an
// instance that has not seen the leader's Lease waits for its own.
type FailoverPolicy struct {
	Lease   time.Duration // without any renewal, until another takes over
	Valid   time.Duration // how long the leader may act after it sent the last renewal that was confirmed
	Renew   time.Duration // between renewals
	Timeout time.Duration // of one request to the server
}

// The time from a crash of the leader until there is another one: Aggressive 0.9 to 1.4 s, Balanced 2.4 to 3.1 s, Conservative 6
// to 7.6 s; while NATS takes writes, that is. A cluster that lost the server which led the bucket needs some seconds to replace
// that first, during which nobody leads.
var (
	Aggressive   = FailoverPolicy{Lease: 1200 * time.Millisecond, Valid: 800 * time.Millisecond, Renew: 250 * time.Millisecond, Timeout: 250 * time.Millisecond}
	Balanced     = FailoverPolicy{Lease: 3 * time.Second, Valid: 2200 * time.Millisecond, Renew: 600 * time.Millisecond, Timeout: 500 * time.Millisecond}
	Conservative = FailoverPolicy{Lease: 7500 * time.Millisecond, Valid: 6 * time.Second, Renew: 1500 * time.Millisecond, Timeout: time.Second}
)

const (
	maxLease   = 24 * time.Hour
	wantPolicy = "want 24h >= Lease > Valid > Renew > 0 and Timeout > 0, such as aegis.Balanced"
)

func (p FailoverPolicy) valid() bool {
	return p.Lease > p.Valid && p.Valid > p.Renew && p.Renew > 0 && p.Timeout > 0 && p.Lease <= maxLease
}

// Lead campaigns for the leadership of a group among the instances of the service, [A-Za-z][A-Za-z0-9_-]* and at most 64
// characters, and calls fn each time it is won, with the term: a number that rises from leader to leader, and never falls. It
// needs no Start. What fn does, no other instance does meanwhile: fn's ctx ends when the leadership does, and has [Term] too. A
// process that was paused learns of that a moment late; only the term is exact then, for a store that remembers the highest one.
//
// When fn returns while it leads, the leadership is released, and Lead returns fn's error. When the leadership is lost, or a
// health check fails, Lead waits until fn has returned, and campaigns again. When ctx ends, so does fn's, and Lead releases and
// returns [ErrCanceled] or [ErrTimeout]; when the service is stopped, [ErrClosed]. Other errors: [ErrInvalid] for a group or a
// policy that is out of range or the group "default" if the service has [Exclusive] handlers, whose group that is; [ErrUnavailable]
// without JetStream.
func (s *Service) Lead(ctx context.Context, group string, p FailoverPolicy, fn func(ctx context.Context, term uint64) error) error {
	switch {
	case !isName(group, maxService):
		return newError(ErrInvalid, "Lead: group %q: want a letter, then letters, digits, - and _, at most %d", group, maxService)
	case !p.valid():
		return newError(ErrInvalid, "Lead: %+v: %s", p, wantPolicy)
	case fn == nil:
		return newError(ErrInvalid, "Lead: the function is nil")
	case group == defaultGroup && s.hasExclusive():
		return newError(ErrInvalid, "Lead: group %q is that of the exclusive handlers of %s: choose another", group, s.name)
	}
	c := s.newCandidate(group, p)
	if !c.enter() {
		return newError(ErrClosed, "Lead: service %s was stopped", s.name)
	}
	defer c.withdraw()
	failure := s.patiently(ctx, func(ctx context.Context) *Error {
		_, failure := s.openStream(ctx, s.leadersStream(), leadersPrefix+c.key)
		return failure
	})
	if failure != nil && failure.Code != ErrTimeout.Code && failure.Code != ErrCanceled.Code && s.pick() != nil {
		return failure
	} // else it waits for the server
	campaigning, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.quitting, cancel)()
	var result error
	done := false
	c.campaign(campaigning, campaigning, func(t *term) {
		s.leading.Add(1)
		defer s.leading.Add(-1)
		ctx, end := context.WithCancel(t)
		defer end()
		defer context.AfterFunc(t.resigned, end)()
		err := fn(ctx, t.number)
		if ctx.Err() == nil && t.holds() {
			result, done = err, true
			cancel()
		}
	})
	switch {
	case done:
		return result
	case ctx.Err() != nil:
		return asError(ctx.Err())
	}
	return newError(ErrClosed, "Lead: service %s was stopped", s.name)
}

// IsLeader tells whether this instance leads the service, that is, its group "default", at this moment: exactly, by the clock. It
// doesn't block.
func (s *Service) IsLeader() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.candidates {
		if c.group == defaultGroup && c.term.Load().holds() {
			return true
		}
	}
	return false
}

// Leader is the id of the instance that leads the service, that is, its group "default", as far as it is known here; [ErrNotFound]
// if none does. The first call asks the server, until ctx ends or for [WithTimeout]; later ones answer from a copy that is kept up
// to date. [ErrUnavailable] if there is no connection at first, or no JetStream.
func (s *Service) Leader(ctx context.Context) (string, error) {
	if s.IsLeader() {
		return s.id, nil
	}
	w := s.leaders(s.name, defaultGroup)
	if failure := w.wait(ctx); failure != nil {
		return "", failure
	}
	if e, ok := w.get(w.filter); ok && e.value.leads() && clock() < e.seen+e.value.Lease {
		return e.value.Holder, nil
	}
	return "", newError(ErrNotFound, "nobody leads %s", s.name)
}

// Term is the term of the leadership that ctx belongs to: in an [Exclusive] handler, and in the function of [Service.Lead]; 0
// elsewhere.
func Term(ctx context.Context) uint64 {
	if t, ok := ctx.Value(termKey{}).(*term); ok {
		return t.number
	}
	return 0
}

const (
	leadersBucket = "aegis_leaders"
	leadersPrefix = "$KV." + leadersBucket + "."
	defaultGroup  = "default"
)

func (s *Service) leadersStream() jetstream.StreamConfig {
	config := s.bucket(leadersBucket)
	config.FirstSeq = uint64(time.Now().UnixMilli()) // so that no revision comes twice, should the bucket be lost
	return config
}

// leaders watches who leads a group of a service.
func (s *Service) leaders(service, group string) *watch[claim] {
	key := service + "." + group
	return s.elections.get(key, func() *watch[claim] {
		return newWatch(s, leadersBucket, key, func(_ string, c *claim) bool { return c.valid() })
	})
}

// leaderOf is the instance that leads a service, "" if none is known to.
func (s *Service) leaderOf(ctx context.Context, service string) string {
	w := s.leaders(service, defaultGroup)
	if !w.ready.Load() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, explainTimeout)
		defer cancel()
	}
	if failure := w.wait(ctx); failure != nil {
		return ""
	}
	if e, ok := w.get(w.filter); ok && e.value.leads() {
		return e.value.Holder
	}
	return ""
}

// A claim is what the key of a group holds. Each that is written is different from all others, by its nonce and when it was sent.
type claim struct {
	Holder   string        `json:"holder"` // an instance; "" marks the begin of a wait
	Nonce    string        `json:"nonce"`  // of the candidate that wrote it
	Term     uint64        `json:"term"`
	Lease    time.Duration `json:"lease"` // ns
	Sent     time.Duration `json:"sent"`  // by the clock of the process that wrote it; it means nothing to others
	Released bool          `json:"released,omitempty"`
}

func (c *claim) leads() bool { return c.Holder != "" && !c.Released }

// valid reports whether c can be from aegis.
func (c *claim) valid() bool { return c.Nonce != "" && c.Term <= math.MaxInt64 && c.Lease >= 0 && c.Lease <= maxLease }

// A candidate takes part in the election of a group's leader. All but term and nudge belong to the goroutine that campaigns, or,
// while it leads, to the one that renews.
type candidate struct {
	svc        *Service
	group, key string
	policy     FailoverPolicy
	nonce      string
	watch      *watch[claim]
	nudge      chan struct{} // unhealthy has changed

	running atomic.Bool          // campaignForExclusive did it
	term    atomic.Pointer[term] // the latest

	seen     claim // what the key holds, as far as is known
	revision uint64
	since    time.Duration // when that was seen first
	highest  uint64        // of all terms that were seen
	longest  time.Duration // of all leases
	on       *conn         // see conn
}

// A term is a time of leadership. As a ctx it ends when the lease does.
type term struct {
	context.Context
	number   uint64
	until    atomic.Int64 // when the lease ends, by the clock
	lapse    *time.Timer
	cancel   context.CancelFunc
	resigned context.Context // ends when it is to be given up since the instance isn't well
	resign   context.CancelFunc
}

type termKey struct{}

// holds tells whether the instance leads, at this moment. It is exact: when a process goes on that was paused, the clock has gone on too.
func (t *term) holds() bool { return t != nil && int64(clock()) < t.until.Load() }

// extend makes the lease end later; not if it has ended: a lapse ends the term.
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
		svc: s, group: group, key: s.name + "." + group, policy: p,
		nonce: rand.Text(),
		nudge: make(chan struct{}, 1),
	}
}

// enter must come before campaign. Stop waits for withdraw then. It is not ok if the service was stopped already.
func (c *candidate) enter() (ok bool) {
	c.svc.mu.Lock()
	defer c.svc.mu.Unlock()
	if c.svc.state == stopping {
		return false
	}
	c.svc.candidates[c] = true
	c.svc.campaigns.Add(1)
	return true
}

func (c *candidate) withdraw() {
	c.svc.mu.Lock()
	delete(c.svc.candidates, c)
	c.svc.mu.Unlock()
	c.svc.campaigns.Done()
}

// campaign calls lead each time that the candidate is elected, until ctx ends. Leadership ends when lead returns; its term's ctx is
// parent's child.
func (c *candidate) campaign(ctx, parent context.Context, lead func(*term)) {
	c.watch = c.svc.leaders(c.svc.name, c.group)
	for ctx.Err() == nil {
		if t := c.win(ctx, parent); t != nil {
			c.hold(ctx, t, lead)
		}
	}
}

// win waits until the lease is free, and takes it; nil when ctx ends.
func (c *candidate) win(ctx, parent context.Context) *term {
	for failures := 0; ; {
		changed := c.watch.nextChange()
		if e, ok := c.watch.get(c.key); ok && e.revision > c.revision {
			c.observe(e.value, e.revision)
		}
		wait := c.vacant()
		if c.svc.unhealthy.Load() {
			wait = c.policy.Lease // a nudge comes first
		} else if wait <= 0 {
			t, failure := c.take(parent)
			if t != nil {
				return t
			}
			wait = c.vacant()
			if failures++; failure == nil || failure.Code == conflict.Code { // someone else was faster
				failures = 0
			} else if wait = backoff(failures, c.policy.Timeout/8, c.policy.Timeout); failures%16 == 1 {
				c.svc.log.Warn("the leader's lease can't be reached", "group", c.group, "error", failure)
			}
		}
		select {
		case <-changed:
		case <-c.nudge:
		case <-time.After(max(wait, time.Millisecond)):
		case <-ctx.Done():
			return nil
		}
	}
}

// vacant tells when the lease is free: in how long, at the most.
func (c *candidate) vacant() time.Duration {
	if c.seen.Nonce == "" || c.seen.Released {
		return 0
	}
	lease := cmp.Or(c.seen.Lease, c.policy.Lease)
	if c.seen.Holder == "" { // whose lease may still be on isn't known
		lease = max(lease, c.longest)
	}
	return c.since + lease - clock()
}

// observe notes what the key holds. Only a change of it counts as a sign of life.
func (c *candidate) observe(now claim, revision uint64) {
	if revision != c.revision || now != c.seen {
		c.seen, c.revision, c.since = now, revision, clock()
	}
	c.highest, c.longest = max(c.highest, now.Term), max(c.longest, now.Lease)
}

// take takes the lease over if it is free, which it makes sure of first: what was seen may be old.
func (c *candidate) take(parent context.Context) (*term, *Error) {
	now, revision, failure := c.read()
	if failure != nil {
		return nil, failure
	}
	if now == nil {
		// Someone may lead until its lease ends, whose key was deleted, or whose bucket was lost. So the wait begins with a claim of
		// nobody, which can't be mistaken for another one if that happens again.
		c.revision = revision
		_, failure := c.put(claim{Term: c.highest, Lease: max(c.longest, c.policy.Lease)})
		return nil, failure
	}
	if *now != c.seen || revision != c.revision {
		c.observe(*now, revision)
		signal(c.watch.refill) // it has missed something
	}
	if c.vacant() > 0 {
		return nil, nil
	}
	number := max(c.highest+1, uint64(time.Now().UnixMilli()))
	sent, failure := c.put(claim{Holder: c.svc.id, Term: number, Lease: c.policy.Lease})
	if failure != nil {
		return nil, failure
	}
	t := &term{number: number}
	t.Context, t.cancel = context.WithCancel(context.WithValue(parent, termKey{}, t))
	t.resigned, t.resign = context.WithCancel(context.Background())
	until := sent + c.policy.Valid
	t.until.Store(int64(until))
	t.lapse = time.AfterFunc(time.Hour, func() {
		if !t.holds() { // else it was just extended
			t.end()
		}
	})
	t.lapse.Reset(until - clock())
	c.term.Store(t)
	return t, nil
}

// hold leads until lead returns, or not at all if ctx has ended. Then, if the lease stands, it is released.
func (c *candidate) hold(ctx context.Context, t *term, lead func(*term)) {
	c.svc.log.Info("elected leader", "group", c.group, "term", t.number)
	stop := make(chan struct{})
	var renewing sync.WaitGroup
	renewing.Go(func() { c.renew(t, stop) })
	defer func() { // also if lead panics
		close(stop)
		renewing.Wait()
		released := t.holds()
		t.end()
		t.resign()
		c.svc.changed()
		if released = released && (!c.running.Load() || !c.svc.exclusiveBusy()); released { // else the lease runs out first
			c.release(t)
		}
		c.svc.log.Info("leads no more", "group", c.group, "term", t.number, "released", released)
	}()
	if ctx.Err() == nil {
		lead(t)
	}
}

// renew renews the lease until stop is closed, it is lost, or the instance isn't well; then it runs out, unless it is released.
func (c *candidate) renew(t *term, stop <-chan struct{}) {
	due := c.seen.Sent + c.policy.Renew
	for {
		select {
		case <-time.After(due - clock()):
		case <-c.nudge:
		case <-stop:
			return
		}
		if !t.holds() { // paused, perhaps
			t.end()
			return
		}
		if c.svc.unhealthy.Load() {
			t.resign()
			return
		}
		sent, failure := c.put(claim{Holder: c.svc.id, Term: t.number, Lease: c.policy.Lease})
		switch {
		case failure == nil && t.extend(sent+c.policy.Valid):
			due = sent + c.policy.Renew
		case !t.holds(), failure.Code == conflict.Code:
			c.svc.log.Warn("leadership lost", "group", c.group, "term", t.number, "error", failure)
			t.end()
			return
		default:
			due = clock() + c.policy.Renew/5
		}
	}
}

// release lets the next leader begin at once.
func (c *candidate) release(t *term) {
	for range 2 { // a renewal that was given up may have come in between
		_, failure := c.put(claim{Holder: c.svc.id, Term: t.number, Lease: c.policy.Lease, Released: true})
		if failure == nil || failure.Code != conflict.Code || c.seen.Nonce != c.nonce {
			return
		}
	}
}

// put replaces the claim that was seen last by one of this candidate, and returns when the claim that the key has now was sent. That
// may be an earlier one that was stored without a confirmation. The failure is a conflict if the key has another claim.
func (c *candidate) put(next claim) (sent time.Duration, failure *Error) {
	next.Nonce, next.Sent = c.nonce, clock()
	data, _ := json.Marshal(next)                                                // strings and numbers can't fail
	ctx, cancel := context.WithTimeout(context.Background(), 2*c.policy.Timeout) // one to store it, one to read it back
	defer cancel()
	x := &exchange{subject: leadersPrefix + c.key, data: data, until: next.Sent + c.policy.Timeout, on: c.conn()}
	value, revision, failure := c.svc.compareAndSwap(ctx, x, c.svc.leadersStream(), c.revision)
	c.on = x.on
	if failure != nil && failure.Code != conflict.Code {
		return 0, failure
	}
	now := parseClaim(value)
	c.observe(now, revision)
	sent, now.Sent = now.Sent, next.Sent
	if now != next {
		return 0, failure
	}
	return sent, nil
}

// conn returns the connection that was used last as long as it works, because it takes some time to notice one that hangs.
func (c *candidate) conn() *conn {
	if c.on == nil || !c.on.up.Load() {
		c.on = c.svc.pick()
	}
	return c.on
}

// read returns the claim that the key has, nil if there is none.
func (c *candidate) read() (now *claim, revision uint64, failure *Error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.policy.Timeout)
	defer cancel()
	data, revision, failure := c.svc.readKey(ctx, c.conn(), leadersBucket, c.key)
	if failure != nil {
		c.on = c.svc.pickOther(c.on)
	}
	if failure != nil || data == nil {
		return nil, revision, failure
	}
	claim := parseClaim(data)
	return &claim, revision, nil
}

// parseClaim returns the claim in the value of a key. One that is not from aegis is of somebody unknown.
func parseClaim(data []byte) (c claim) {
	if len(data) > 0 && (json.Unmarshal(data, &c) != nil || !c.valid()) {
		c = claim{Nonce: "?"}
	}
	return c
}

// hasExclusive tells whether there are any.
func (s *Service) hasExclusive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exclusive != nil
}

// campaignForExclusive campaigns for the leadership of the service itself, until Stop, once exclusive handlers listen.
func (s *Service) campaignForExclusive(ctx context.Context) error {
	s.mu.Lock()
	c := s.exclusive
	s.mu.Unlock()
	if c == nil || c.running.Load() {
		return nil
	}
	failure := s.patiently(ctx, func(ctx context.Context) *Error {
		_, failure := s.openStream(ctx, s.leadersStream(), leadersPrefix+c.key)
		return failure
	})
	if failure != nil {
		return failure
	}
	s.probePublish(leadersPrefix+c.key, readSubject(leadersBucket))
	s.leaderOf(ctx, s.name) // so that it can tell who leads, if that can be found out now
	if c.running.CompareAndSwap(false, true) && c.enter() {
		go func() {
			defer c.withdraw()
			c.campaign(s.quitting, s.base, s.lead)
		}()
	}
	return nil
}

// lead serves exclusively for a term: until the lease ends, or what has come is finished, since the instance stops or isn't well.
func (s *Service) lead(t *term) {
	s.changed()
	select {
	case <-t.Done():
	case <-s.quitting.Done():
	case <-t.resigned.Done():
		s.shareAll()
		_ = s.flush(t) // if that fails, a request may be turned away
	}
	for t.holds() && s.exclusiveBusy() { // if it isn't over, though its ctx may be, since Stop's time is up
		time.Sleep(time.Millisecond)
	}
}

// exclusiveBusy tells whether exclusive handlers run, or may still begin to.
func (s *Service) exclusiveBusy() bool {
	return slices.ContainsFunc(s.handlers(), func(e *endpoint) bool {
		return e.lease != nil && !isClosed(e.finished) && (s.quitting.Err() != nil || e.busy())
	})
}

// notActive is the answer of an instance that doesn't lead.
func (c *candidate) notActive() *Error {
	e := notRun(newError(ErrNotActive, "instance %s of %s stands by", c.svc.id, c.svc.name))
	e.Source = c.svc.name
	if leader := c.svc.leaderOf(endedContext, c.svc.name); leader != "" && leader != c.svc.id {
		e.Message += ": " + leader + " leads"
		e.Details = map[string]string{"leader": leader}
	}
	return e
}
