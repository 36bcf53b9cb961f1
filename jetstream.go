package aegis

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file is what JetStream does for the rest: streams and buckets are made and checked, messages stored, keys written by
// compare-and-swap, read and watched; and a feed brings what is stored to an endpoint.

// provide is a stream for a subject, which it makes if there is none. One that exists is its operator's: it is used as it is, if it
// can be.
func (s *Service) provide(ctx context.Context, want jetstream.StreamConfig, subject string) (jetstream.Stream, *Error) {
	js, failure := s.jetStream()
	if failure != nil {
		return nil, failure
	}
	stream, err := js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = js.CreateStream(ctx, want)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // someone else was faster
			if stream, err = js.Stream(ctx, want.Name); errors.Is(err, jetstream.ErrStreamNotFound) {
				return nil, newError(ErrTimeout, "the stream %s is just being made by someone else", want.Name) // a cluster takes a moment
			}
		}
	}
	if err != nil {
		return nil, jetStreamError(ctx, err, "the stream "+want.Name)
	}
	have := stream.CachedInfo().Config
	fix := ""
	switch {
	case have.NoAck:
		fix = "it has to confirm what it stores: set no_ack to false"
	case have.Retention == jetstream.WorkQueuePolicy && want.Retention != have.Retention:
		fix = "its retention is workqueue, though several consumers want each message: set it to limits"
	case want.Retention == jetstream.WorkQueuePolicy && want.Retention != have.Retention:
		fix = "its retention has to be workqueue"
	case want.RePublish != nil && (have.RePublish == nil || have.RePublish.Destination != want.RePublish.Destination):
		fix = "it has to republish " + want.RePublish.Source + " to " + want.RePublish.Destination
	case want.AllowMsgTTL && !have.AllowMsgTTL:
		fix = "set allow_msg_ttl"
	case want.SubjectDeleteMarkerTTL > 0 && have.SubjectDeleteMarkerTTL == 0:
		fix = "set subject_delete_marker_ttl, such as 1h, so that others learn of what expires"
	case !takes(stream, subject):
		fix = "it takes no " + subject + ": add " + want.Subjects[0] + " to its subjects"
	}
	if fix != "" {
		return nil, notRun(newError(ErrInvalid, "the stream %s, which exists, can't be used: %s", want.Name, fix))
	}
	return stream, nil
}

// takes tells whether all subjects of a pattern go to the stream.
func takes(stream jetstream.Stream, subject string) bool {
	return slices.ContainsFunc(stream.CachedInfo().Config.Subjects, func(p string) bool { return covers(p, subject) })
}

func (s *Service) jetStream() (jetstream.JetStream, *Error) {
	if c := s.pick(); c != nil {
		return c.js, nil
	}
	return nil, s.disconnectedError()
}

// patiently tries to do something with JetStream again while a cluster has no leader, until ctx ends, or for WithTimeout.
func (s *Service) patiently(ctx context.Context, do func(ctx context.Context) *Error) *Error {
	ctx, cancel := withDeadline(ctx, s.cfg.timeout)
	defer cancel()
	for n := 1; ; n++ {
		within, cancel := context.WithTimeout(ctx, 2*time.Second)
		within, done := s.asking(within)
		failure := do(within)
		done()
		cancel()
		if failure == nil || failure.Code != ErrTimeout.Code || !sleep(ctx, backoff(n, 50*time.Millisecond, time.Second)) {
			return failure
		}
	}
}

// jetStreamError is what the JetStream API's error about something means, which was asked with ctx.
func jetStreamError(ctx context.Context, err error, what string) *Error {
	var api *jetstream.APIError
	denied, _ := context.Cause(ctx).(*Error)
	switch {
	case denied != nil && errors.Is(err, context.Canceled):
		return denied
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount), errors.Is(err, nats.ErrNoResponders):
		return notRun(newError(ErrUnavailable, "%s: no JetStream: run nats-server with -js, and enable it for the account", what))
	case errors.As(err, &api) && (api.ErrorCode == temporarilyUnavailable || api.ErrorCode == noSuitablePeers):
		return newError(ErrTimeout, "%s: %s (%d)", what, api.Description, api.ErrorCode)
	case errors.As(err, &api):
		return notRun(newError(kindOf(strconv.Itoa(api.Code)), "%s: %s (%d)", what, api.Description, api.ErrorCode))
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
		return newError(ErrTimeout, "%s: no answer from JetStream: %v", what, err)
	case errors.Is(err, context.Canceled):
		return newError(ErrCanceled, "%s: %v", what, err)
	}
	return newError(ErrUnavailable, "%s: %v", what, err)
}

// Codes of the JetStream API.
const (
	noSuitablePeers         = 10005 // servers of a cluster that isn't complete, yet or any more
	temporarilyUnavailable  = 10008 // what a cluster without a leader answers; or it doesn't, and forgets what it was asked
	wrongSequence           = 10071
	wrongSequenceReplicated = 10164
	inProcess               = 10158 // a message of that id is just being stored
)

// keep stores x in a stream, in as many attempts as it may take.
func (s *Service) keep(ctx context.Context, x *exchange, stream jetstream.StreamConfig, cfg *callConfig, buf *packer) *Error {
	_, failure := s.persist(ctx, x, cfg, buf, func() (*nats.Msg, *Error, bool) {
		_, failure := s.store(ctx, x, stream)
		return nil, failure, mayPass(failure)
	})
	return failure
}

// store sends x, once, to be stored in a stream, which is made if nobody listens.
func (s *Service) store(ctx context.Context, x *exchange, stream jetstream.StreamConfig) (sequence uint64, failure *Error) {
	answer, failure := s.request(ctx, x)
	if failure == errNobody {
		if failure = s.provideFor(ctx, x, stream); failure == nil {
			answer, failure = s.request(ctx, x)
		}
	}
	switch failure {
	case nil:
		return stored(answer, x.subject)
	case errNobody:
		return 0, nobodyStores(x.subject)
	}
	return 0, failure
}

func nobodyStores(subject string) *Error {
	return notRun(newError(ErrUnavailable, "no stream takes %s for now", subject))
}

// provideFor makes the stream that x is for.
func (s *Service) provideFor(ctx context.Context, x *exchange, stream jetstream.StreamConfig) *Error {
	ctx, cancel := context.WithTimeout(ctx, x.until-clock())
	defer cancel()
	_, failure := s.provide(ctx, stream, x.subject)
	if failure != nil && failure.Code == ErrTimeout.Code {
		failure = newError(ErrUnavailable, "nobody takes %s for now: %s", x.subject, failure.Message)
	}
	if failure != nil {
		failure.NotRun = true
	}
	return failure
}

// stored reads the answer to what was to be stored: its sequence, or why it wasn't.
func stored(answer *nats.Msg, subject string) (uint64, *Error) {
	var ack struct {
		jetstream.PubAck
		Error *jetstream.APIError `json:"error"`
	}
	err := json.Unmarshal(answer.Data, &ack)
	switch refused := ack.Error; {
	case isNobody(answer):
		return 0, nobodyStores(subject)
	case err != nil || refused == nil && ack.Stream == "":
		return 0, newError(ErrInternal, "%s was answered by something that is no stream: %.100q", subject, answer.Data)
	case refused == nil:
		return ack.Sequence, nil
	case refused.ErrorCode == inProcess:
		return 0, newError(ErrUnavailable, "%s was sent before and is not stored yet: %s (%d)", subject, refused.Description, refused.ErrorCode)
	case refused.ErrorCode == wrongSequence || refused.ErrorCode == wrongSequenceReplicated:
		return 0, notRun(newError(conflict, "%s was refused: %s (%d)", subject, refused.Description, refused.ErrorCode))
	default:
		return 0, notRun(newError(kindOf(strconv.Itoa(refused.Code)), "%s was refused: %s (%d)", subject, refused.Description, refused.ErrorCode))
	}
}

// conflict is what was to be stored only after a certain message, and came too late.
var conflict = &Error{Code: "CONFLICT"}

// bucket is the stream of a key-value bucket.
func (s *Service) bucket(name string) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:              "KV_" + name,
		Subjects:          []string{"$KV." + name + ".>"},
		MaxMsgsPerSubject: 1,
		Discard:           jetstream.DiscardNew,
		AllowRollup:       true,
		DenyDelete:        true,
		AllowDirect:       true,
		Replicas:          s.cfg.replicas,
	}
}

// readKey asks a bucket's leader for the latest value of a key, nil if there is none; on a certain connection, if c is not nil. It
// waits until ctx ends, but for WithTimeout at most.
func (s *Service) readKey(ctx context.Context, c *conn, bucket, key string) (value []byte, revision uint64, failure *Error) {
	ask, _ := json.Marshal(map[string]string{"last_by_subj": "$KV." + bucket + "." + key}) // a string: it can't fail
	x := &exchange{subject: readSubject(bucket), data: ask, on: c}
	answer, failure := s.request(ctx, x.within(ctx, s.cfg.timeout))
	if failure == errNobody {
		failure = notRun(newError(ErrUnavailable, "no JetStream: run nats-server with -js, and enable it for the account"))
	}
	if failure != nil {
		return nil, 0, failure
	}
	var got struct {
		Message struct {
			Sequence uint64 `json:"seq"`
			Data     []byte `json:"data"`
		} `json:"message"`
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(answer.Data, &got); err != nil {
		return nil, 0, newError(ErrInternal, "reading %s of %s: %v", key, bucket, err)
	}
	switch {
	case got.Error != nil && got.Error.Code == 404:
		return nil, 0, nil
	case got.Error != nil:
		return nil, 0, jetStreamError(ctx, got.Error, "the key "+key+" of "+bucket)
	case len(got.Message.Data) == 0: // deleted
		return nil, got.Message.Sequence, nil
	}
	return got.Message.Data, got.Message.Sequence, nil
}

func readSubject(bucket string) string { return "$JS.API.STREAM.MSG.GET.KV_" + bucket }

// A watch is a local copy of some keys of a bucket. It survives reconnects: then it is filled anew, aside, and replaced when that is
// complete; until then it stays as it is.
type watch[T any] struct {
	svc            *Service
	bucket, filter string
	sane           func(key string, v *T) bool // what isn't is left out
	version        atomic.Uint64               // counts changes
	ready          atomic.Bool                 // it was filled once
	again          chan struct{}               // tells it to begin anew, once it is filled

	mu      sync.Mutex // guards the rest
	entries map[string]entry[T]
	failure *Error // of the latest attempt to fill it
	changed chan struct{}
}

type entry[T any] struct {
	value    T
	revision uint64
	created  time.Time     // by the server's clock
	seen     time.Duration // by the clock
}

const watchSilence = 15 * time.Second // after which it begins anew: there is a heartbeat or a renewal before that

// newWatch follows the keys that match filter until the service is stopped.
func newWatch[T any](s *Service, bucket, filter string, sane func(string, *T) bool) *watch[T] {
	w := &watch[T]{svc: s, bucket: bucket, filter: filter, sane: sane, again: make(chan struct{}, 1), changed: make(chan struct{})}
	ok := s.task(func() {
		defer func() { w.fail(s.closedError()) }()
		for trouble := 1; s.base.Err() == nil; trouble++ {
			begin, longest := clock(), time.Second
			if failure := w.follow(s.base); failure != nil {
				w.fail(failure)
				if failure.Code == ErrDenied.Code { // each denial is logged, by the server too: so it soon asks rarely
					longest = time.Minute
					trouble++
				}
			}
			if clock()-begin > time.Second || s.pick() == nil { // it went well, or there is nothing to ask
				trouble = 1
			}
			sleep(s.base, backoff(trouble, fetchTick, longest))
		}
	})
	if !ok {
		w.failure = s.closedError()
	}
	return w
}

// follow keeps the copy up to date until the connection drops, nothing comes any more, or it is told to begin anew.
func (w *watch[T]) follow(ctx context.Context) *Error {
	c := w.svc.pick()
	if c == nil {
		return w.svc.disconnectedError()
	}
	drops := c.drops.Load()
	ctx, cancel := context.WithCancelCause(ctx) // ends the watcher
	defer cancel(nil)
	slow := time.AfterFunc(2*whyTimeout, func() { cancel(newError(ErrTimeout, "the bucket %s: no answer from JetStream", w.bucket)) })
	asking, done := w.svc.asking(ctx)
	denied := context.AfterFunc(asking, func() { cancel(context.Cause(asking)) })
	kv, err := c.js.KeyValue(ctx, w.bucket)
	var watcher jetstream.KeyWatcher
	if err == nil {
		watcher, err = kv.Watch(ctx, w.filter)
	}
	slow.Stop()
	denied()
	done()
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		w.fill(map[string]entry[T]{})
		return nil
	}
	if err != nil {
		return jetStreamError(ctx, err, "the bucket "+w.bucket)
	}
	defer func() {
		cancel(nil)
		go func() { // until it has noticed; it may be held up by what nobody takes
			for range watcher.Updates() {
			}
		}()
	}()
	fresh := map[string]entry[T]{} // until it is complete
	silence := clock()
	var again chan struct{}
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	for {
		select {
		case e, ok := <-watcher.Updates():
			silence = clock()
			switch {
			case !ok:
				return nil
			case e == nil:
				w.fill(fresh)
				fresh, again = nil, w.again
			default:
				w.apply(fresh, e)
			}
		case <-tick.C:
			if c.drops.Load() != drops || clock()-silence > watchSilence {
				return nil
			}
		case <-again:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// apply notes a change, in fresh until that is nil.
func (w *watch[T]) apply(fresh map[string]entry[T], e jetstream.KeyValueEntry) {
	now := entry[T]{revision: e.Revision(), created: e.Created(), seen: clock()}
	gone := e.Operation() != jetstream.KeyValuePut
	if !gone {
		if err := json.Unmarshal(e.Value(), &now.value); err != nil || !w.sane(e.Key(), &now.value) {
			w.svc.log.Warn("an entry is not from aegis, and left out", "bucket", w.bucket, "key", e.Key(), "revision", now.revision, "error", err)
			gone = true
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	into := fresh
	if fresh == nil {
		into = w.entries
		w.changedLocked()
	}
	if gone {
		delete(into, e.Key())
	} else {
		into[e.Key()] = now
	}
}

func (w *watch[T]) fill(fresh map[string]entry[T]) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, e := range fresh {
		if old, ok := w.entries[key]; ok && old.revision == e.revision {
			e.seen = old.seen
			fresh[key] = e
		}
	}
	w.entries, w.failure = fresh, nil
	w.ready.Store(true)
	w.changedLocked()
}

func (w *watch[T]) changedLocked() {
	w.version.Add(1)
	close(w.changed)
	w.changed = make(chan struct{})
}

// fail notes why it can't be filled.
func (w *watch[T]) fail(failure *Error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failure = failure
	w.changedLocked()
}

// news is closed at the next change.
func (w *watch[T]) news() <-chan struct{} {
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

// wait waits until it was filled once, and fails if that can't be.
func (w *watch[T]) wait(ctx context.Context) *Error {
	if w.svc.base.Err() != nil {
		return notRun(w.svc.closedError())
	}
	if w.ready.Load() {
		return nil
	}
	ctx, cancel := withDeadline(ctx, w.svc.cfg.timeout)
	defer cancel()
	for {
		w.mu.Lock()
		failure, news := w.failure, w.changed
		w.mu.Unlock()
		switch {
		case w.ready.Load():
			return nil
		case failure != nil && failure.Code != ErrTimeout.Code:
			return notRun(newError(failure, "%s", failure.Message))
		}
		select {
		case <-news:
		case <-ctx.Done():
			return notRun(newError(asError(ctx.Err()), "the bucket %s: %v", w.bucket, ctx.Err()))
		}
	}
}

// A lookup is a map that is filled as it is asked. What is there already is read without a lock.
type lookup[T any] struct {
	most int                          // keys, if not 0; later ones share the key others
	of   atomic.Pointer[map[string]T] // replaced as a whole
	mu   sync.Mutex                   // guards the replacing
}

const others = "OTHERS"

func (l *lookup[T]) get(key string, make func() T) T {
	find := func() (v T, ok bool) {
		of := l.all()
		if v, ok = of[key]; !ok && l.most > 0 && len(of) >= l.most {
			key = others
			v, ok = of[key]
		}
		return v, ok
	}
	if v, ok := find(); ok {
		return v
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if v, ok := find(); ok {
		return v
	}
	v := make()
	of := map[string]T{strings.Clone(key): v} // it may be a part of something large
	maps.Copy(of, l.all())
	l.of.Store(&of)
	return v
}

// all must not be changed.
func (l *lookup[T]) all() map[string]T {
	if of := l.of.Load(); of != nil {
		return *of
	}
	return nil
}

// A feed brings an endpoint what pull consumers of a stream have. It asks for as many messages as can be handled at once and no
// more, so that what was delivered is what is handled, and the rest waits in the server.
type feed struct {
	*endpoint
	cfg      handlerConfig
	stream   jetstream.StreamConfig // to be made if there is none
	lanes    []*lane                // the most urgent first
	claimed  atomic.Int64           // messages asked for, waiting in the queue, or being handled
	ackWait  atomic.Int64           // the shortest
	starts   int                    // since a start of the less urgent, or all lanes were empty
	on       atomic.Bool            // see share
	failed   atomic.Bool            // something was wrong with a request
	wake     chan struct{}          // more can be asked for, or on has changed
	settled  chan struct{}          // nothing more will come
	keeping  sync.WaitGroup         // keepAlive, of commands also what writes progress or looks at records
	look     func()                 // is called when it does, unless it is nil
	counting sync.Mutex             // guards counted, and what the lanes have pending
	counted  time.Duration          // when the server was asked for that
	fetching sync.WaitGroup         // fetch and what it has begun

	mu      sync.Mutex // guards the rest, and that no inbox is made once drained
	drained bool
	cancel  context.CancelFunc // ends the asking
}

// A lane is one of a feed's consumers. It is asked for one thing at a time. The fields without a guard are fetch's, or before that
// open's.
type lane struct {
	config   jetstream.ConsumerConfig
	redrive  string // a subject besides the one in config, "" for none
	provided atomic.Bool
	most     int64 // to ask for at once
	expiry   time.Duration
	floor    uint64                // all up to this sequence is done with
	asked    atomic.Bool           // for what has not come yet
	inbox    atomic.Pointer[inbox] // where that comes
	inbound  chan *nats.Msg        // from there, and from those before
	pending  int64                 // messages, as far as is known; guarded by the feed's counting
}

type inbox struct {
	sub   *nats.Subscription
	on    *conn
	drops uint32 // of the connection, when it was made
}

const (
	maxAckPending = 1 << 16 // events of a subscription that are handled, or wait for their next attempt
	maxWaiting    = 1 << 12 // requests for events, of all instances
)

func newLane(consumer, subject string) *lane {
	return &lane{config: jetstream.ConsumerConfig{
		Durable:        consumer,
		FilterSubjects: []string{subject},
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        10 * time.Second,
		MaxDeliver:     -1, // attempts are counted here, so that the last one leads to the dead letters
		MaxAckPending:  maxAckPending,
		MaxWaiting:     maxWaiting,
	}}
}

func newFeed(e *endpoint, cfg handlerConfig, stream jetstream.StreamConfig, lanes ...*lane) *feed {
	for _, l := range lanes {
		l.inbound = make(chan *nats.Msg, cfg.concurrency+64)
	}
	return &feed{endpoint: e, cfg: cfg, stream: stream, lanes: lanes, wake: make(chan struct{}, 1), settled: make(chan struct{})}
}

func (f *feed) open(ctx context.Context) error {
	failure := f.svc.patiently(ctx, func(ctx context.Context) *Error {
		failure := f.provide(ctx)
		if failure == nil {
			_, failure = f.svc.provide(ctx, f.svc.deadStream(), f.letters())
		}
		return failure
	})
	if failure != nil {
		return failure
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drained {
		return f.svc.closedError()
	}
	ctx, f.cancel = context.WithCancel(f.svc.base)
	for _, l := range f.lanes {
		f.svc.probe(l.next(f.stream.Name), "$JS.ACK."+f.stream.Name+"."+l.config.Durable)
	}
	f.svc.probe(f.letters(), returnPrefix+f.lanes[0].config.Durable)
	f.fetching.Go(func() { f.fetch(ctx) })
	f.keeping.Go(f.keepAlive)
	return nil
}

// share begins or ends the asking. What was asked for still comes.
func (f *feed) share(on bool) error {
	if f.on.Swap(on) != on {
		poke(f.wake)
	}
	return nil
}

// provide makes the consumers that aren't there, and learns from the others what their operator may have changed.
func (f *feed) provide(ctx context.Context) *Error {
	var shortest time.Duration
	for _, l := range f.lanes {
		stream, failure := f.svc.provide(ctx, f.stream, l.config.FilterSubjects[0])
		if failure != nil {
			return failure
		}
		ackWait, failure := f.provideLane(ctx, stream, l)
		if failure != nil {
			return failure
		}
		shortest = min(ackWait, cmp.Or(shortest, ackWait))
	}
	f.ackWait.Store(int64(shortest))
	return nil
}

func (f *feed) provideLane(ctx context.Context, stream jetstream.Stream, l *lane) (ackWait time.Duration, failure *Error) {
	config := l.config
	subject := config.FilterSubjects[0]
	if l.redrive != "" && takes(stream, l.redrive) && !covers(subject, l.redrive) {
		config.FilterSubjects = append(slices.Clone(config.FilterSubjects), l.redrive)
	}
	what := "the consumer " + config.Durable + " of " + f.stream.Name
	consumer, err := stream.Consumer(ctx, config.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if l.provided.Load() { // so it was deleted
			if stream.CachedInfo().State.LastSeq < l.floor { // with the stream
				l.floor = 0
			}
			f.svc.log.Warn("the consumer was deleted, and is made again", "endpoint", f.name, "consumer", config.Durable, "after", l.floor)
			if f.stream.Retention == jetstream.LimitsPolicy {
				config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, l.floor+1
			}
		}
		if consumer, err = stream.CreateConsumer(ctx, config); errors.Is(err, jetstream.ErrConsumerExists) { // someone else was faster
			consumer, err = stream.Consumer(ctx, config.Durable)
		}
	}
	if err != nil {
		return 0, jetStreamError(ctx, err, what)
	}
	info := consumer.CachedInfo()
	have := info.Config
	filters := append(have.FilterSubjects, have.FilterSubject)
	if !slices.Contains(filters, subject) || have.AckPolicy != jetstream.AckExplicitPolicy || have.MaxDeliver > 0 {
		return 0, notRun(newError(ErrInvalid, "%s, which exists, is not one for %s with explicit acknowledgement and max_deliver -1: delete it, or choose another name by Durable", what, subject))
	}
	ordered, redriven := config.MaxAckPending == 1, slices.ContainsFunc(filters, func(p string) bool { return covers(p, l.redrive) })
	if ordered != (have.MaxAckPending == 1) || len(config.FilterSubjects) > 1 && !redriven {
		have.MaxAckPending, have.FilterSubject, have.FilterSubjects = config.MaxAckPending, "", config.FilterSubjects
		if _, err := stream.UpdateConsumer(ctx, have); err != nil {
			return 0, jetStreamError(ctx, err, what)
		}
	}
	l.floor = info.AckFloor.Stream
	l.most, l.expiry = int64(f.limit), fetchExpiry
	if have.MaxRequestBatch > 0 {
		l.most = min(l.most, int64(have.MaxRequestBatch))
	}
	if have.MaxRequestExpires > 0 {
		l.expiry = min(l.expiry, have.MaxRequestExpires)
	}
	l.provided.Store(true)
	return have.AckWait, nil
}

// drain asks for no more. In a cluster it takes what was asked for until that expires: after an Unsubscribe, servers farther
// away go on sending for a moment, to nobody, and each event lost like that would have used up an attempt.
func (f *feed) drain(ctx context.Context) {
	f.mu.Lock()
	f.drained = true
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	end := clock() + fetchExpiry + fetchSlack
	for _, l := range f.lanes {
		in := l.inbox.Load()
		if in == nil {
			continue
		}
		if in.on.nc.ConnectedClusterName() != "" {
			for l.asked.Load() && clock() < end && in.on.up.Load() && sleep(ctx, 5*time.Millisecond) {
			}
		}
		_ = in.sub.Drain() // fails only on a closed connection
	}
}

func (f *feed) cut(c *conn) {
	for _, l := range f.lanes {
		if in := l.inbox.Load(); in != nil && in.on == c {
			_ = in.sub.Unsubscribe() // fails only on a closed connection
		}
	}
}

func (f *feed) settle() {
	close(f.settled)
	f.fetching.Wait()
	for _, l := range f.lanes {
		for len(l.inbound) > 0 {
			f.accept(<-l.inbound)
		}
	}
}

func (f *feed) forget(ctx context.Context) {
	f.keeping.Wait()
	if l := f.lanes[0]; f.cfg.broadcast && f.svc.cfg.id == "" && l.provided.Load() { // nobody will come back to the consumer
		if js, failure := f.svc.jetStream(); failure == nil {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			ctx, done := f.svc.asking(ctx)
			defer done()
			_ = js.DeleteConsumer(ctx, f.stream.Name, l.config.Durable) // else the server does, in an hour
		}
	}
}

const (
	fetchTick    = 250 * time.Millisecond // between looks at the connection
	fetchExpiry  = time.Second            // of what was asked for
	fetchSlack   = time.Second            // until the server has told so
	fetchSession = 15 * time.Second       // until the consumers are looked at anew
)

// fetch brings events until ctx ends.
func (f *feed) fetch(ctx context.Context) {
	looked, trouble := clock(), 0
	for ctx.Err() == nil {
		free := int64(f.limit) - f.claimed.Load()
		goOn := f.on.Load() && free > 0
		if goOn && f.worthAsking(free) {
			goOn = f.ask(free)
		} else if goOn {
			sleep(ctx, time.Millisecond) // for more to be free, or what came to be taken
		}
		failed := f.failed.Swap(false)
		if failed {
			trouble++
			sleep(ctx, backoff(trouble, fetchTick, 2*time.Second))
		} else {
			trouble = 0
		}
		if (failed || clock()-looked > fetchSession) && f.svc.pick() != nil {
			within, cancel := context.WithTimeout(ctx, 5*time.Second)
			if failure := f.provide(within); failure != nil && ctx.Err() == nil {
				f.svc.log.Warn("events can't be fetched", "endpoint", f.name, "error", failure)
			}
			cancel()
			looked = clock()
		}
		if !goOn && !failed {
			select {
			case <-f.wake:
			case <-ctx.Done():
			}
		}
	}
}

// ask asks for what can be handled, and tells whether there may be more at once. If there are several lanes, it asks each what it has
// there, the urgent ones first, until one has something; those that are empty wait for their next message meanwhile. One start in
// 16 goes to the other end, so that nothing waits forever.
func (f *feed) ask(free int64) bool {
	if len(f.lanes) == 1 {
		f.bring(f.lanes[0], free, false)
		return true
	}
	lanes, otherEnd := f.lanes, f.starts >= 15
	if otherEnd {
		lanes = slices.Clone(lanes)
		slices.Reverse(lanes)
		free = max(free/16, 1)
	}
	for _, l := range lanes {
		if l.asked.Load() { // it is empty
			continue
		}
		if n := f.bring(l, free, true); n > 0 {
			f.starts += n
			if otherEnd {
				f.starts = 0
			}
			return true
		}
		f.await(l)
	}
	f.starts = 0
	return false
}

// bring asks a lane for up to n messages, hands on those that come, and returns how many. It is done when no more will: those that
// are there now have come, or also those that come before the request expires.
func (f *feed) bring(l *lane, n int64, now bool) (came int) {
	n = min(n, l.most)
	f.claimed.Add(n)
	if f.request(l, n, now) {
		f.collect(l, n, func(m *nats.Msg) {
			came++
			f.queue <- m // never blocks for long: there is room for all that may run
		})
	}
	f.claimed.Add(int64(came) - n)
	return came
}

// await has an empty lane tell of its next message, which is beyond what is claimed.
func (f *feed) await(l *lane) {
	if f.request(l, 1, false) {
		f.fetching.Go(func() {
			f.collect(l, 1, f.accept)
			poke(f.wake)
		})
	}
}

// accept takes a message that isn't claimed yet. If there is no room, it hands a command back; an event would lose an attempt.
func (f *feed) accept(m *nats.Msg) {
	if f.claimed.Add(1) > int64(f.limit) && f.kind == kindCommand { // others came at the same time
		f.tell(m, "-NAK")
		f.release()
		return
	}
	f.queue <- m
}

// collect takes what has been asked for, until n messages have come or no more will.
func (f *feed) collect(l *lane, n int64, take func(*nats.Msg)) {
	defer l.asked.Store(false)
	in, begun := l.inbox.Load(), clock()
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	for n > 0 {
		select {
		case m := <-l.inbound:
			status := m.Header.Get("Status")
			message := m.Reply != "" || status == ""
			switch {
			case message && m.Sub == in.sub:
				n--
				take(m)
			case message: // of a request that was given up
				f.accept(m)
			case m.Sub != in.sub:
			case status == "404", status == "408", m.Header.Get("Nats-Pending-Messages") != "": // no more there, or it has expired
				return
			default:
				f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", status+" "+m.Header.Get("Description"))
				f.failed.Store(true)
				return
			}
		case <-tick.C:
			if in.on.drops.Load() != in.drops || clock()-begun > fetchExpiry+fetchSlack { // not every request that is dropped is told
				f.hangUp(l)
				f.failed.Store(true)
				return
			}
		case <-f.settled:
			return // settle sees to what is left
		}
	}
}

// listen is the lane's inbox, a new one if there is none or its connection was lost; nil if there is no connection or no more is to
// be asked for.
func (f *feed) listen(l *lane) *inbox {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drained {
		return nil
	}
	in := l.inbox.Load()
	if in == nil || in.drops != in.on.drops.Load() {
		f.hangUp(l)
		c := f.svc.pick()
		if c == nil {
			return nil
		}
		in = &inbox{on: c, drops: c.drops.Load()}
		var err error
		if in.sub, err = c.nc.ChanSubscribe(c.newInbox(), l.inbound); err != nil {
			return nil
		}
		l.inbox.Store(in)
	}
	l.asked.Store(true)
	return in
}

// hangUp gives a lane's inbox up. What is under way still comes.
func (f *feed) hangUp(l *lane) {
	if in := l.inbox.Swap(nil); in != nil {
		_ = in.sub.Drain() // fails only on a closed connection
	}
}

// request asks a lane for n messages: those that are there, or also those that come before it expires.
func (f *feed) request(l *lane, n int64, now bool) bool {
	ask := pullRequest{Batch: n, NoWait: now}
	if !now {
		ask.Expires = l.expiry
	}
	data, _ := json.Marshal(ask) // numbers: it can't fail
	in := f.listen(l)
	if in != nil && in.on.nc.PublishRequest(l.next(f.stream.Name), in.sub.Subject, data) == nil {
		return true
	}
	l.asked.Store(false)
	f.failed.Store(true)
	return false
}

func (l *lane) next(stream string) string {
	return "$JS.API.CONSUMER.MSG.NEXT." + stream + "." + l.config.Durable
}

type pullRequest struct {
	Batch   int64         `json:"batch"`
	Expires time.Duration `json:"expires,omitempty"`
	NoWait  bool          `json:"no_wait,omitempty"`
}

const (
	pendingTimeout = 250 * time.Millisecond
	pendingAge     = time.Second // until the server is asked again
)

// pending is what the consumers had when the server was asked last, which this does if nobody did just now.
func (f *feed) pending() (n int64) {
	f.counting.Lock()
	defer f.counting.Unlock()
	if js, failure := f.svc.jetStream(); failure == nil && (f.counted == 0 || clock()-f.counted > pendingAge) {
		ctx, cancel := context.WithTimeout(f.svc.base, pendingTimeout)
		defer cancel()
		for _, l := range f.lanes {
			if consumer, err := js.Consumer(ctx, f.stream.Name, l.config.Durable); err == nil {
				l.pending = int64(consumer.CachedInfo().NumPending)
			}
		}
		f.counted = clock()
	}
	for _, l := range f.lanes {
		n += l.pending
	}
	return n
}

// worthAsking tells whether it is time to ask for more: not for each single one as long as others wait to be handled.
func (f *feed) worthAsking(free int64) bool {
	return free > 0 && (free >= int64(f.limit)/8 || len(f.queue) == 0)
}

func (f *feed) release() {
	if f.worthAsking(int64(f.limit) - f.claimed.Add(-1)) {
		poke(f.wake)
	}
}

// keepAlive tells the server about events whose handling takes long, lest it deliver them again, until their deadline.
func (f *feed) keepAlive() {
	for {
		third := time.Duration(f.ackWait.Load()) / 3
		select {
		case <-time.After(third):
		case <-f.gone:
			return
		}
		for _, m := range f.longRunning(1 + int(f.cfg.deadline/third)) {
			f.tell(m, "+WPI")
		}
		if f.look != nil {
			f.look()
		}
	}
}

// A delivery is what is known of an event but for its payload.
type delivery struct {
	id       string
	subject  string // the original one
	consumer string
	time     time.Time
	sequence uint64
	attempt  int
}

// delivery reads what the server says about m, nil if it is not a message of this feed.
func (f *feed) delivery(m *nats.Msg) *delivery {
	meta, err := m.Metadata()
	if err != nil || meta.Stream != f.stream.Name || !slices.ContainsFunc(f.lanes, func(l *lane) bool { return l.config.Durable == meta.Consumer }) {
		return nil
	}
	d := &delivery{
		id:       m.Header.Get(jetstream.MsgIDHeader),
		subject:  m.Subject,
		consumer: meta.Consumer,
		time:     meta.Timestamp,
		sequence: meta.Sequence.Stream,
		attempt:  int(meta.NumDelivered),
	}
	if strings.HasPrefix(m.Subject, redrivePrefix) {
		d.subject, d.id = m.Header.Get(headerSubject), m.Header.Get(headerID)
		if t, err := time.Parse(time.RFC3339Nano, m.Header.Get(headerTime)); err == nil {
			d.time = t
		}
	}
	d.id = strings.TrimPrefix(d.id, strings.TrimPrefix(d.subject, eventPrefix)+":")
	if d.id == "" {
		d.id = strconv.FormatUint(d.sequence, 10)
	}
	return d
}

func (f *feed) newRequest(m *nats.Msg, d *delivery, arrived time.Time) *request {
	r := &request{
		svc:      f.svc,
		msg:      Message{Kind: f.kind, Subject: d.subject, Header: m.Header, Data: m.Data},
		in:       m,
		id:       d.id,
		deadline: arrived.Add(f.cfg.deadline),
		delivery: d,
	}
	if name := m.Header.Get(headerSource); isName(name, maxService) {
		r.msg.Source = name
	}
	return r
}

// tell acknowledges a delivery one way or the other. If that is lost, the event is delivered again after its ack wait.
func (f *feed) tell(m *nats.Msg, what string) { f.svc.notify(m.Reply, []byte(what)) }

func nakAfter(pause time.Duration) string {
	return `-NAK {"delay":` + strconv.FormatInt(int64(pause), 10) + "}"
}

// retry has the event delivered again after a pause.
func (f *feed) retry(r *request, failure *Error) {
	pause := backoff(r.delivery.attempt, f.cfg.backoff, f.cfg.maxPause)
	f.logger(r).Warn("an attempt failed", "error", failure, "attempt", r.delivery.attempt, "pause", pause)
	f.tell(r.in, nakAfter(pause))
}

// returned hands a message back. If this instance isn't to have it, since it doesn't lead, what it has asked for expires first.
func (f *feed) returned() string {
	if f.lease != nil && f.svc.quitting.Err() == nil {
		return nakAfter(fetchExpiry)
	}
	return "-NAK"
}

// insist tries until it works, or Stop's time is up. The event stays with this instance meanwhile.
func (f *feed) insist(r *request, problem string, do func(ctx context.Context) *Error) bool {
	for n := 1; ; n++ {
		ctx, cancel := context.WithTimeout(f.svc.base, 5*time.Second)
		failure := do(ctx)
		cancel()
		if failure == nil {
			return true
		}
		f.logger(r).Error(problem, "error", failure)
		if !sleep(f.svc.base, backoff(n, fetchTick, 5*time.Second)) {
			return false
		}
	}
}
