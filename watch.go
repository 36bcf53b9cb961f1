package aegis

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the watch, a local copy of some keys of a bucket. The registry and the election use it. At the end of the file is
// what starts a watch when it is first needed, and ends it when nobody needs it any more.

// A watch is a local copy of some keys of a bucket. It survives reconnects, and the loss of the bucket: then it fills a new copy,
// which replaces the old one when it is complete.
//
// Entries with a TTL are not lost because the servers were away. An entry stays for its TTL if it has expired meanwhile, that
// is, if the new copy does not have it, or if the server reports the expiry too late. It does not stay if it was deleted.
type watch[T any] struct {
	use            usage
	svc            *Service
	bucket, filter string
	valid          func(key string, v *T) bool // entries for which it reports false are left out

	// adopt is called with a new revision of an entry and the old one, which is nil if there was none. It may let both share
	// parts. It reports whether those who wait for a change need not be woken. If adopt is nil, every revision wakes them.
	adopt func(old, now *entry[T]) bool

	version atomic.Uint64 // counts changes
	ready   atomic.Bool   // whether the copy was ever complete
	refill  chan struct{} // a signal makes follow return, and so a new copy be filled

	mu      sync.Mutex // guards the rest
	entries map[string]entry[T]
	lost    time.Duration // when the copy was last kept up to date, by the clock, once that has ended
	failure *Error        // of the latest attempt to fill the copy; nil if that succeeded
	changed chan struct{} // closed and replaced at each change
}

type entry[T any] struct {
	value    T
	revision uint64
	created  time.Time     // by the server's clock
	seen     time.Duration // when this watch first got the revision, by the clock
	ttl      time.Duration // 0 if the entry does not expire
	until    time.Duration // when the entry is dropped unless there is a new revision, by the clock; 0 if it does not expire
	kept     bool          // whether it stays until then although the server has reported its expiry, because the servers were away
	gone     bool          // whether the server no longer has it
	expired  bool          // whether it is gone because its TTL was over; otherwise somebody has deleted it
}

const (
	watchHeartbeat = time.Second     // between the messages by which the server shows that a consumer exists
	watchSilence   = 3 * time.Second // without any of them, after which the copy is filled anew
	expirySlack    = 2 * time.Second // for the server to report an expiry
)

func newWatch[T any](
	s *Service, bucket, filter string, valid func(string, *T) bool, adopt func(old, now *entry[T]) bool,
) *watch[T] {
	return &watch[T]{
		svc: s, bucket: bucket, filter: filter, valid: valid, adopt: adopt,
		refill: make(chan struct{}, 1), changed: make(chan struct{}),
	}
}

func (w *watch[T]) usage() *usage { return &w.use }

// run keeps the copy until ctx ends or the service is stopped.
func (w *watch[T]) run(ctx context.Context) {
	for trouble := 1; ctx.Err() == nil; trouble++ {
		begin, longest := clock(), time.Second
		if failure := w.follow(ctx); failure != nil {
			w.fail(failure)
			if failure.Code == ErrDenied.Code { // it asks rarely, because each denial is logged, by the server too
				longest = time.Minute
				trouble++
			}
		}
		connected := w.svc.pick() != nil
		if clock()-begin > apiTimeout+time.Second || !connected { // it went well, or no connection is up
			trouble = 1
		}
		if connected { // otherwise a copy could not be had again
			w.use.retire()
		}
		sleep(ctx, backoff(trouble, retryPause, longest))
	}
	if w.svc.base.Err() != nil {
		w.fail(w.svc.closedError())
	}
}

// A filling is the state of one subscription of follow. The watch's mu guards its first three fields.
type filling[T any] struct {
	fresh    map[string]entry[T] // the new copy until it is complete, then nil
	received uint64              // how many entries have come
	ended    bool                // whether entries are ignored, because one is missing or follow has returned
	heard    atomic.Int64        // when the latest message came, by the clock
	broken   chan struct{}       // receives a signal when an entry is missing
}

// follow keeps the copy up to date until the connection drops, nothing comes any more, or a new copy is wanted.
func (w *watch[T]) follow(ctx context.Context) *Error {
	c := w.svc.pick()
	if c == nil {
		return w.svc.disconnectedError()
	}
	begin, drops, what := clock(), c.drops.Load(), "the bucket "+w.bucket
	f := &filling[T]{fresh: map[string]entry[T]{}, broken: make(chan struct{}, 1)}
	f.heard.Store(int64(begin))
	sub, err := c.nc.Subscribe(c.newInbox(), func(m *nats.Msg) { w.receive(c, f, m) })
	if err != nil {
		return w.svc.jetStreamError(begin, err, what)
	}
	defer w.end(f)
	defer sub.Unsubscribe()
	within, cancel := context.WithTimeout(ctx, apiTimeout)
	consumer, err := c.js.CreatePushConsumer(within, "KV_"+w.bucket, jetstream.ConsumerConfig{
		DeliverSubject: sub.Subject, FilterSubject: "$KV." + w.bucket + "." + w.filter,
		DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy, AckPolicy: jetstream.AckNonePolicy, MaxDeliver: 1,
		MemoryStorage: true, Replicas: 1, FlowControl: true, IdleHeartbeat: watchHeartbeat,
	})
	cancel()
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		w.mu.Lock()
		defer w.mu.Unlock()
		w.fillLocked(f)
		return nil
	case err != nil:
		return w.svc.jetStreamError(begin, err, what)
	}
	if info := consumer.CachedInfo(); info.NumPending == 0 && info.Delivered.Consumer == 0 {
		w.mu.Lock()
		w.fillLocked(f)
		w.mu.Unlock()
	}
	tick := time.NewTicker(retryPause)
	defer tick.Stop()
	for last := clock(); ; last = clock() {
		var refill chan struct{} // w.refill once the copy is complete
		if w.complete(f) {
			refill = w.refill
		}
		select {
		case <-tick.C:
			now := clock()
			silence, pause := now-time.Duration(f.heard.Load()), now-last // pause is long if the process was paused
			switch {
			case silence > watchSilence && refill == nil:
				return newError(ErrTimeout, "%s: no answer from JetStream", what)
			case silence > watchSilence, pause > watchSilence, c.drops.Load() != drops:
				return nil
			}
			if !w.expire(now) {
				return nil
			}
			w.use.retire()
		case <-refill:
			return nil
		case <-f.broken:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// receive takes a message of the consumer: an entry, or one that only shows that the consumer exists. If a message is missing,
// the copy has to be filled anew.
func (w *watch[T]) receive(c *conn, f *filling[T], m *nats.Msg) {
	if m.Header.Get("Status") != "" {
		if reply := cmp.Or(m.Reply, m.Header.Get("Nats-Consumer-Stalled")); reply != "" {
			_ = c.nc.Publish(reply, nil) // asks for more; fails only if the connection is down
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		f.heard.Store(int64(clock()))
		if last := m.Header.Get("Nats-Last-Consumer"); last != "" && last != strconv.FormatUint(f.received, 10) {
			signal(f.broken)
		}
		return
	}
	meta, err := m.Metadata()
	if err != nil {
		return // somebody else has sent it
	}
	key := strings.TrimPrefix(m.Subject, "$KV."+w.bucket+".")
	now := entry[T]{revision: meta.Sequence.Stream, created: meta.Timestamp, seen: clock()}
	now.ttl = parseTTL(m.Header.Get(jetstream.MsgTTLHeader))
	reason := m.Header.Get(jetstream.MarkerReasonHeader)
	now.gone, now.expired = reason != "" || m.Header.Get("KV-Operation") != "", reason == "MaxAge"
	if !now.gone {
		if err := json.Unmarshal(m.Data, &now.value); err != nil || !w.valid(key, &now.value) {
			w.svc.log.Warn("ignoring a registry or election entry that is not from aegis",
				"bucket", w.bucket, "key", key, "revision", now.revision, "error", err)
			now.gone = true
		}
	}
	if now.ttl > 0 {
		now.until = now.seen + now.ttl + expirySlack
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	f.heard.Store(int64(now.seen))
	switch f.received++; {
	case f.ended:
	case f.received != meta.Sequence.Consumer:
		f.ended = true
		signal(f.broken)
	case f.fresh == nil:
		w.applyLocked(key, now)
	default:
		f.fresh[key] = now
		if meta.NumPending == 0 {
			w.fillLocked(f)
		}
	}
}

// applyLocked puts a change into the copy.
func (w *watch[T]) applyLocked(key string, now entry[T]) {
	old, known := w.entries[key]
	switch {
	case !now.gone:
		if !w.replaceLocked(w.entries, key, now) {
			w.changedLocked()
		}
	case known && now.expired && now.created.Sub(old.created) > old.ttl+expirySlack: // late, because the servers were away
		old.until, old.kept, old.gone = now.seen+old.ttl, true, true
		w.entries[key] = old
	case known && now.expired && old.kept:
		old.gone = true
		w.entries[key] = old
	case known:
		delete(w.entries, key)
		w.changedLocked()
	}
}

// replaceLocked puts an entry into a copy. It reports whether those who wait for a change need not be woken.
func (w *watch[T]) replaceLocked(into map[string]entry[T], key string, now entry[T]) (same bool) {
	if w.adopt != nil {
		var before *entry[T]
		if old, known := w.entries[key]; known {
			before = &old
		}
		same = w.adopt(before, &now)
	}
	into[key] = now
	return same
}

// fillLocked replaces the copy by the new one, unless it has done so before.
func (w *watch[T]) fillLocked(f *filling[T]) {
	if f.fresh == nil {
		return
	}
	fresh, now, same := f.fresh, clock(), w.ready.Load() && w.adopt != nil
	f.fresh = nil
	// Carry over what the new copy can't know. An entry that is unchanged or has expired, and has a TTL, may belong to an instance
	// that could not write while the servers were away. It stays for one more TTL or, if it was gone already when the old copy
	// ended, for the rest of its time.
	for key, old := range w.entries {
		e, known := fresh[key]
		switch {
		case known && !e.gone && (e.revision != old.revision || !e.created.Equal(old.created)): // it was written again
		case known && !e.gone && old.ttl == 0:
			fresh[key] = old // with the time at which the revision was first seen
		case known && e.gone && !e.expired, old.ttl == 0: // it was deleted, which those who wait have to learn
			same = false
		default:
			left := old.ttl
			if old.gone {
				left = old.until - w.lost
			}
			old.until, old.kept, old.gone = now+left, true, !known || e.gone
			fresh[key] = old
		}
	}
	for key, e := range fresh {
		if e.gone && !e.kept {
			delete(fresh, key)
		} else {
			same = w.replaceLocked(fresh, key, e) && same
		}
	}
	w.entries, w.failure = fresh, nil
	w.ready.Store(true)
	if !same {
		w.changedLocked()
	}
}

// expire removes the entries that were kept, that the server does not have any more, and whose time is over. It reports false
// if the time of others is over. The server should have reported that: either it can't, or somebody has removed them from the
// stream. A new copy shows which.
func (w *watch[T]) expire(now time.Duration) (ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	ok = true
	before := len(w.entries)
	for key, e := range w.entries {
		if e.until > 0 && e.until < now {
			ok = ok && e.gone
			if e.gone {
				delete(w.entries, key)
			}
		}
	}
	if len(w.entries) != before {
		w.changedLocked()
	}
	return ok
}

// complete reports whether f has filled the copy.
func (w *watch[T]) complete(f *filling[T]) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f.fresh == nil
}

// end is called when nothing more of f is wanted.
func (w *watch[T]) end(f *filling[T]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f.ended = true
	if f.fresh == nil {
		w.lost = clock()
	}
}

// changedLocked counts a change, and wakes those who wait for it.
func (w *watch[T]) changedLocked() {
	w.version.Add(1)
	w.wakeLocked()
}

func (w *watch[T]) wakeLocked() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// fail notes why the copy can't be filled. The old copy stays.
func (w *watch[T]) fail(failure *Error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failure = failure
	w.wakeLocked()
}

// nextChange returns a channel that is closed at the next change.
func (w *watch[T]) nextChange() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *watch[T]) get(key string) (entry[T], bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e, ok := w.entries[key]
	return e, ok
}

func (w *watch[T]) all() []entry[T] {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Values(w.entries))
}

// wait waits until the copy has been complete once. It fails when ctx ends or, if ctx has no deadline, after WithTimeout, and
// when the copy can't be filled for a reason other than a timeout.
func (w *watch[T]) wait(ctx context.Context) *Error {
	if w.svc.base.Err() != nil {
		return notRun(w.svc.closedError())
	}
	if w.ready.Load() {
		return nil
	}
	if !w.use.hold() {
		return notRun(newError(ErrOverloaded, "%s of %s: more than %d of them are looked up at once", w.filter, w.bucket, maxWatches))
	}
	defer w.use.release()
	ctx, cancel := withDeadline(ctx, w.svc.cfg.timeout)
	defer cancel()
	for {
		w.mu.Lock()
		failure, changed := w.failure, w.changed
		w.mu.Unlock()
		switch {
		case w.ready.Load():
			return nil
		case failure != nil && failure.Code != ErrTimeout.Code:
			return notRun(newError(failure, "%s", failure.Message))
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return notRun(newError(asError(ctx.Err()), "the bucket %s: %v", w.bucket, ctx.Err()))
		}
	}
}

const (
	idleTime   = time.Minute   // without use, after which a watch ends
	maxWatches = 1024          // of one kind, besides those that are held
	usageEnded = math.MinInt64 // the value of usage.used after the watch has ended
)

// A usage says how long a watch goes on: as long as somebody holds it, and for idleTime after it was last asked for. A watch that
// has ended stays so; who needs one again starts another.
type usage struct {
	used    atomic.Int64 // when the watch was last asked for, by the clock, or ended
	mu      sync.Mutex   // guards the rest, and the change to ended
	holders int
	end     func() // ends the watch
}

// touch notes that the watch is used. It reports false if the watch has ended.
func (u *usage) touch() bool {
	now := int64(clock())
	for {
		old := u.used.Load()
		if old == usageEnded || now-old < int64(time.Second) { // to note it once in a second is enough
			return old != usageEnded
		}
		if u.used.CompareAndSwap(old, now) {
			return true
		}
	}
}

// hold keeps the watch until release is called. It reports false if the watch has ended.
func (u *usage) hold() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.used.Load() == usageEnded {
		return false
	}
	u.holders++
	return true
}

func (u *usage) held() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.holders > 0
}

func (u *usage) release() {
	u.mu.Lock()
	u.holders--
	u.mu.Unlock()
	u.retire()
}

// retire ends the watch if nobody needs it any more.
func (u *usage) retire() { u.endUnused(clock() - idleTime) }

// endUnused ends the watch if nobody holds it, and it was last asked for at the time before, or earlier.
func (u *usage) endUnused(before time.Duration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	used := u.used.Load()
	if u.holders == 0 && used <= int64(before) && used != usageEnded && u.used.CompareAndSwap(used, usageEnded) {
		u.end()
	}
}

// A watching has the watches of one kind, by key. Its svc and make have to be set before it is used.
type watching[W interface {
	usage() *usage
	run(context.Context)
	fail(*Error)
}] struct {
	svc     *Service
	make    func(key string) W
	watches sync.Map
	mu      sync.Mutex   // guards adding
	count   atomic.Int64 // of watches
}

// get returns the watch of key, which goes on for idleTime. If there is none, get starts one.
func (g *watching[W]) get(key string) W {
	for {
		if v, ok := g.watches.Load(key); ok && v.(W).usage().touch() {
			return v.(W)
		}
		g.start(key, clock())
	}
}

// hold returns the watch of key, which goes on until the caller calls release on its usage. If there is none, hold starts one.
func (g *watching[W]) hold(key string) W {
	for {
		if v, ok := g.watches.Load(key); ok && v.(W).usage().hold() {
			return v.(W)
		}
		g.start(key, clock()-idleTime) // so that the watch ends as soon as it is released
	}
}

// start starts the watch of key, unless there is one. If there are too many, it ends the one that was not used for the longest
// time.
func (g *watching[W]) start(key string, used time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v, ok := g.watches.Load(key); ok && v.(W).usage().used.Load() != usageEnded {
		return
	}
	if g.count.Load() >= maxWatches {
		g.makeRoom()
	}
	key = strings.Clone(key) // it may be a part of a large string
	w := g.make(key)
	ctx, cancel := context.WithCancel(g.svc.base)
	u := w.usage()
	u.used.Store(int64(used))
	u.end = func() {
		cancel()
		g.watches.CompareAndDelete(key, w)
		g.count.Add(-1)
	}
	g.watches.Store(key, w)
	g.count.Add(1)
	if !g.svc.startTask(func() { w.run(ctx) }) {
		w.fail(g.svc.closedError())
	}
}

// makeRoom ends the watch that was not used for the longest time, if there are maxWatches that nobody holds.
func (g *watching[W]) makeRoom() {
	var oldest *usage
	unheld := 0
	for _, v := range g.watches.Range {
		u := v.(W).usage()
		if u.held() {
			continue
		}
		if unheld++; oldest == nil || u.used.Load() < oldest.used.Load() {
			oldest = u
		}
	}
	if unheld >= maxWatches {
		oldest.endUnused(clock())
	}
}
