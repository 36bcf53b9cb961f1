package aegis

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file takes a message to its handler and brings the answer back: endpoints, their workers, and middleware. RPC, events and
// commands all go through it. Each of them has its own kind of source, which brings the messages to an endpoint and sends back
// the results.

// A HandlerFunc handles or sends one message, and returns the payload of the answer. It is what a [Middleware] wraps.
type HandlerFunc func(ctx context.Context, msg *Message) ([]byte, error)

// A Middleware wraps a handler ([WithMiddleware]) or the sending of messages ([WithCallMiddleware]), for example to check,
// measure or change messages and answers. The HandlerFunc that it returns must pass to next the ctx that it was given, or a ctx
// derived from that one, and must not return before next does. If it returns an error without calling next, the caller's error
// has NotRun set.
type Middleware func(next HandlerFunc) HandlerFunc

// The kinds of messages that are handled, and of those that are sent.
const (
	kindRPC, kindEvent, kindCommand = "rpc", "event", "command"
	kindCall, kindPublish, kindSend = "call", "publish", "send"
)

// A Message is a message that is handled or sent, as a [Middleware] gets it.
type Message struct {
	Kind, Subject string      // Kind is "rpc", "event" or "command" if it is handled; "call", "publish" or "send" if it is sent
	Source        string      // the service that sent it, as the sender claims (not authenticated); "" if unknown
	Header        nats.Header // nil if there is none; it must not be changed
	Data          []byte      // the payload
}

// A source brings messages into an endpoint's queue.
type source interface {
	open(ctx context.Context) error               // begins to bring messages, unless drain was called
	share(on bool) error                          // begins or ends to take a share of the messages that any instance may handle
	drain(ctx context.Context)                    // asks for no more, and returns when all messages under way are in the queue
	pending() int64                               // returns how many messages wait in the server
	busy() bool                                   // reports whether messages are being handled, wait here, or were asked for
	serve(m *nats.Msg, arrived time.Time)         // handles a message from the queue, on a worker's goroutine
	done(r *request, data []byte, failure *Error) // sends the answer, or acknowledges the message
}

// An endpoint is a handler and the workers that run it.
//
// The read loops of all connections put messages into one queue. A worker takes a message from there and runs the handler itself,
// so that a fast handler does not pay for a goroutine per message. A worker that takes a message and leaves no other worker idle
// starts one first, which waits for the next message. At the limit of workers, shed keeps as many messages waiting as may run,
// and rejects the rest.
type endpoint struct {
	svc                 *Service
	source              source
	candidate           *candidate // the candidate whose term an exclusive handler needs; nil if the handler is not exclusive
	sharing             sync.Mutex // held by share, so that the source learns the latest state last
	kind, name, subject string
	handler             HandlerFunc
	limit, maxIdle      int // how many workers there may be, and how many idle ones stay

	queue      chan *nats.Msg
	waiting    atomic.Pointer[chan arrival] // what shed keeps waiting; nil until there are as many workers as there may be
	reject     func(*nats.Msg)              // refuses a message beyond the limit; nil if the source never brings more than may run
	stopping   chan struct{}                // closed when no more messages will come
	finished   chan struct{}                // closed when all messages are handled
	workerIdle chan struct{}                // receives a signal for shed when a worker is idle
	meter      *meter
	quota      quota // of log lines

	opened      atomic.Bool    // whether open was called
	idle        atomic.Int32   // how many workers wait for a message, or are just starting
	workersDone sync.WaitGroup // counts the workers, and shed
	helpersDone sync.WaitGroup // counts goroutines of the source, which end after finished is closed

	mu       sync.Mutex // guards the rest
	workers  map[*worker]bool
	shedding bool // whether shed runs
}

// A worker is a goroutine that handles one message after another.
type worker struct {
	msg   atomic.Pointer[nats.Msg] // the message that it handles, nil while it waits for one
	since atomic.Int64             // when it took the latest message, by the clock
}

// An arrival is a message and the time at which shed took it from the queue. The time is zero if a worker took the message from
// the queue itself.
type arrival struct {
	msg     *nats.Msg
	arrived time.Time
}

// The queues of a service have room for queueSize messages each, which the read loops can leave before a worker or shed takes
// them. If there are so many handlers that this would be more than queueTotal in all, those that are added later have less
// room.
const queueSize, leastQueueSize, queueTotal = 16384, 1024, 16 * queueSize

// addEndpoint adds a handler, wrapped in the service's middleware, and opens it if the service has been started.
func (s *Service) addEndpoint(e *endpoint, cfg *handlerConfig) error {
	e.svc, e.meter, e.workers = s, newMeter(), map[*worker]bool{}
	e.limit, e.maxIdle = cfg.concurrency, min(cfg.concurrency, runtime.GOMAXPROCS(0))
	e.stopping, e.finished, e.workerIdle = make(chan struct{}), make(chan struct{}), make(chan struct{}, 1)
	for _, mw := range slices.Backward(s.cfg.middleware) {
		e.handler = mw(e.handler)
	}

	s.mu.Lock()
	if s.state == serviceStopping {
		defer s.mu.Unlock()
		return newError(ErrClosed, "adding %s: service %s was stopped", e.name, s.name)
	}
	key := e.kind + " " + e.name
	if s.endpoints[key] != nil {
		defer s.mu.Unlock()
		hint := map[string]string{kindEvent: "; use Durable to give a second subscription to it another name"}[e.kind]
		return newError(ErrInvalid, "%s %q (%s) has a handler already%s", e.kind, e.name, e.subject, hint)
	}
	if cfg.exclusive {
		s.exclusive.CompareAndSwap(nil, s.newCandidate(defaultGroup, s.cfg.failover))
		e.candidate = s.exclusive.Load()
	}
	s.endpoints[key] = e
	size := max(min(queueSize, queueTotal/len(s.endpoints)), leastQueueSize)
	if e.reject == nil { // a feed asks for no more than its limit
		size = min(cfg.concurrency, pullSize)
	}
	e.queue = make(chan *nats.Msg, size)
	serving := s.state == serviceStarted
	s.mu.Unlock()

	if !serving {
		return nil
	}
	ctx, cancel := context.WithTimeout(s.base, s.cfg.timeout)
	defer cancel()
	begin := clock()
	err := e.open(ctx)
	if err == nil {
		signal(s.entryChanged)
		if err = s.campaignForExclusive(ctx); err == nil {
			err = s.checkDenials(ctx, begin)
		}
		return err
	}
	s.mu.Lock()
	stopped := s.state == serviceStopping // then Stop finishes e
	delete(s.endpoints, key)
	s.mu.Unlock()
	if !stopped {
		e.finish(ctx)
	}
	return err
}

// open starts the first worker and then the source.
func (e *endpoint) open(ctx context.Context) error {
	if e.opened.Swap(true) { // Start and addEndpoint may both open an endpoint that is added while Start runs
		return nil
	}
	e.mu.Lock()
	if !isClosed(e.stopping) {
		e.startWorkerLocked()
	}
	e.mu.Unlock()
	if err := e.source.open(ctx); err != nil {
		return err
	}
	return e.share()
}

// share makes the source take a share of the messages that any instance may handle, if this instance is healthy and, for an
// exclusive handler, the leader. Otherwise it ends that. It has to be called whenever one of these conditions may have changed.
func (e *endpoint) share() error {
	e.sharing.Lock()
	defer e.sharing.Unlock()
	return e.source.share(!e.svc.unhealthy.Load() && (e.candidate == nil || e.candidate.term.Load().serves()))
}

// shareAll calls share for every endpoint.
func (s *Service) shareAll() {
	for _, e := range s.allEndpoints() {
		if err := e.share(); err != nil {
			s.log.Error("an endpoint is not served", "kind", e.kind, "endpoint", e.name, "error", err)
		}
	}
}

// finish takes no more messages, and waits until all that have arrived are handled.
func (e *endpoint) finish(ctx context.Context) {
	e.source.drain(ctx)
	e.mu.Lock()
	close(e.stopping)
	e.mu.Unlock()
	e.workersDone.Wait()
	e.mu.Lock()
	close(e.finished)
	e.mu.Unlock()
	e.helpersDone.Wait()
}

// goHelper runs fn on a goroutine that finish waits for, unless finish has come so far already.
func (e *endpoint) goHelper(fn func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !isClosed(e.finished) {
		e.helpersDone.Go(fn)
	}
}

// startWorkerLocked starts a worker, which counts as idle at once. At the limit it makes sure that shed runs instead. The caller
// holds e.mu.
func (e *endpoint) startWorkerLocked() {
	if len(e.workers) < e.limit {
		w := &worker{}
		e.workers[w] = true
		if len(e.workers) == e.limit && e.waiting.Load() == nil { // made before shed starts, so that every worker sees it in time
			e.waiting.Store(new(make(chan arrival, e.limit)))
		}
		e.idle.Add(1)
		e.workersDone.Go(func() { e.svc.asHandler(func() { e.work(w) }) })
	} else if e.reject != nil && !e.shedding {
		e.shedding = true
		e.workersDone.Go(e.shed)
	}
}

// work handles messages until there are enough other idle workers, or no more messages will come.
func (e *endpoint) work(w *worker) {
	left := false // whether take says that w has left
	defer func() {
		if !left { // the handler has called runtime.Goexit, which ends this goroutine: go on in another one
			w.msg.Store(nil)
			e.idle.Add(1)
			e.workersDone.Go(func() { e.svc.asHandler(func() { e.work(w) }) })
		}
	}()
	for {
		var j arrival
		if j, left = e.take(w); left {
			return
		}
		if e.idle.Add(-1) == 0 {
			e.mu.Lock()
			e.startWorkerLocked()
			e.mu.Unlock()
		}
		now := time.Now()
		w.since.Store(int64(now.Sub(clockStart)))
		w.msg.Store(j.msg)
		e.source.serve(j.msg, cmp.Or(j.arrived, now))
		w.msg.Store(nil)
		e.idle.Add(1)
	}
}

// take waits for the next message for w. It reports whether w has left instead.
func (e *endpoint) take(w *worker) (j arrival, left bool) {
	for {
		noMore := isClosed(e.stopping) // then a message that is not there now will not come
		waiting := *cmp.Or(e.waiting.Load(), &noArrivals)
		select {
		case j := <-waiting: // before those in queue, which have come later
			return j, false
		default:
		}
		select {
		case m := <-e.queue:
			return arrival{msg: m}, false
		default:
		}
		if (noMore || int(e.idle.Load()) > e.maxIdle) && e.leave(w, noMore) {
			return arrival{}, true
		}
		signal(e.workerIdle)
		select {
		case m := <-e.queue:
			return arrival{msg: m}, false
		case j := <-waiting:
			return j, false
		case <-e.stopping:
		}
	}
}

var noArrivals chan arrival // from which nothing comes

// waitingCount returns how many messages shed keeps waiting.
func (e *endpoint) waitingCount() int { return len(*cmp.Or(e.waiting.Load(), &noArrivals)) }

// leave removes w if there are enough other idle workers, or if no more messages will come and none is left. It reports whether
// it did. It decides and removes while it holds mu: a worker that startWorkerLocked or shed still counts as idle will look into
// the queue and at the waiting messages once more.
func (e *endpoint) leave(w *worker, noMore bool) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if noMore && len(e.queue)+e.waitingCount() > 0 || !noMore && int(e.idle.Load()) <= e.maxIdle {
		return false
	}
	e.idle.Add(-1)
	delete(e.workers, w)
	return true
}

// shed keeps up to limit messages waiting and rejects the rest, until a worker is idle.
func (e *endpoint) shed() {
	for more := true; more; {
		select {
		case m := <-e.queue:
			select {
			case *e.waiting.Load() <- arrival{m, time.Now()}:
			default:
				e.reject(m)
			}
			continue
		case <-e.workerIdle:
		case <-e.stopping:
		}
		e.mu.Lock()
		more = e.idle.Load() == 0 && !isClosed(e.stopping)
		e.shedding = more
		if !more && e.waitingCount() > 0 && len(e.workers) < e.limit { // all workers may have left before shed put a message there
			e.startWorkerLocked()
		}
		e.mu.Unlock()
	}
}

// handling returns the messages that workers are handling, and have been for at least from and at most to.
func (e *endpoint) handling(from, to time.Duration) (msgs []*nats.Msg) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := clock()
	for w := range e.workers {
		if m, d := w.msg.Load(), now-time.Duration(w.since.Load()); m != nil && d >= from && d <= to {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

// running returns how many messages the workers are handling.
func (e *endpoint) running() int { return len(e.handling(0, math.MaxInt64)) }

// busy reports whether messages wait for a worker or are being handled. It may miss one that a worker has just taken.
func (e *endpoint) busy() bool { return len(e.queue) > 0 || e.waitingCount() > 0 || e.running() > 0 }

// logger returns a logger for what concerns one message.
func (e *endpoint) logger(r *request) *slog.Logger {
	return e.svc.log.With("kind", e.kind, "endpoint", e.name, "correlation_id", r.correlationID())
}

// logOften logs what may happen with each message, at most 10 lines of an endpoint in 10 s. The first line after that says how
// many were left out.
func (e *endpoint) logOften(r *request, level slog.Level, text string, args ...any) {
	leftOut, ok := e.quota.take()
	if !ok {
		return
	}
	if leftOut > 0 {
		args = append(args, "left_out", leftOut)
	}
	e.logger(r).Log(context.Background(), level, text, args...)
}

// A quota bounds how many lines are logged.
type quota struct {
	mu      sync.Mutex    // guards the rest
	until   time.Duration // the end of the present period, by the clock
	lines   int           // logged in it
	leftOut int           // since the last line that was logged
}

// take reports whether one more line may be logged, and how many were left out before it.
func (q *quota) take() (leftOut int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if now := clock(); now >= q.until {
		q.until, q.lines = now+10*time.Second, 0
	}
	if q.lines >= 10 {
		q.leftOut++
		return 0, false
	}
	q.lines++
	leftOut, q.leftOut = q.leftOut, 0
	return leftOut, true
}

// admit gives r its parent ctx. It reports false if the handler is exclusive and this instance does not lead. When the term was
// resigned, what has come for any instance is still handled: requests on the shared subject, and messages that a feed has
// fetched. A request that is addressed to this instance is refused, so that its caller finds the next leader.
func (e *endpoint) admit(r *request) bool {
	r.Context = e.svc.base
	if e.candidate == nil {
		return true
	}
	t := e.candidate.term.Load()
	if !t.holds() || t.resigned.Err() != nil && r.delivery == nil && r.msg.Subject != e.subject {
		return false
	}
	r.Context, r.term = t, t
	return true
}

// dispatch runs the handler, and passes the payload of its answer, or the error for its caller, to the source's done. It does so
// whatever the handler does, even if that panics or ends its goroutine.
func (e *endpoint) dispatch(r *request) {
	if r.termOver() { // the term has ended after admit
		failure := e.candidate.notActive()
		e.meter.count(r.msg.Source, failure)
		r.fenced = true
		r.end()
		e.source.done(r, nil, failure)
		return
	}
	begin := e.meter.begin()
	var data []byte
	failure, panicked := errNotReturned, false
	defer func() {
		switch p := recover(); {
		case p != nil:
			failure, panicked = newError(ErrInternal, "panic in %s: %v", e.name, p), true
			e.logOften(r, slog.LevelError, "handler panicked", "error", p, "stack", string(debug.Stack()))
		case failure == errNotReturned: // the handler has called runtime.Goexit
			failure = newError(ErrInternal, "panic in %s: the handler called runtime.Goexit", e.name)
		case failure == nil && r.run != nil:
			failure = asError(r.run.revocation().orNil()) // a copy, because others have it too
		}
		if r.ran && r.termOver() {
			r.fenced = true
			f := newError(ErrFenced, "%s lost the leadership of term %d while %s ran: the effect may or may not stand",
				e.svc.id, r.term.number, e.name)
			f.Cause = failure
			failure = f
		}
		if failure != nil {
			failure.Source, failure.NotRun = e.svc.name, !r.ran
		}
		r.end()
		e.meter.finish(r.msg.Source, begin, failure)
		if failure != nil && failure.Code == ErrInternal.Code && e.kind == kindRPC && !panicked { // the other sources log each attempt
			e.logOften(r, slog.LevelError, "a request failed", "error", failure)
		}
		e.source.done(r, data, failure)
	}()
	data, err := e.handler(r, &r.msg)
	failure = asError(err)
	if _, permanent := errors.AsType[*permanentError](err); permanent {
		r.permanent = true
	} else {
		r.retryAfter, _ = errors.AsType[*retryError](err)
	}
	limit := e.svc.maxPayload()
	if e.kind == kindCommand {
		limit = (limit - letterRoom) / 4 * 3 // the record has it in base64
	}
	if failure == nil && int64(len(data)) > limit {
		r.permanent = true
		failure = newError(ErrInternal, "the answer of %s has %d bytes, more than the %d that the server's max_payload leaves: "+
			"split it, or raise that limit", e.name, len(data), limit)
	}
}

// A transmission travels in the ctx through the middleware of WithCallMiddleware, so that transmit, the innermost function,
// knows what to send and how.
type transmission struct {
	send       func(ctx context.Context, data []byte) ([]byte, *Error)
	mayHaveRun bool // whether it was sent and a handler may have run
}

type transmissionKey struct{}

// sendThrough calls send through the middleware of WithCallMiddleware, which must not be nil. It returns the answer.
func (s *Service) sendThrough(
	ctx context.Context, kind, subject string, out Raw, send func(ctx context.Context, data []byte) ([]byte, *Error),
) ([]byte, *Error) {
	header, correlation := headersFor(ctx)
	if correlation != "" {
		header = withHeader(header, headerCorrelation, correlation)
	}
	t := &transmission{send: send}
	m := &Message{Kind: kind, Subject: subject, Source: s.name, Header: header, Data: out.data}
	data, err := s.callMiddleware(context.WithValue(ctx, transmissionKey{}, t), m)
	if err == nil {
		return data, nil
	}
	failure, ok := err.(*Error)
	if !ok || failure == nil {
		failure = asError(err)
	}
	if failure.NotRun == t.mayHaveRun {
		failure = new(*failure) // a copy, because others may have it
		failure.NotRun = !t.mayHaveRun
	}
	return nil, failure
}

// through calls send, through the middleware of WithCallMiddleware if there is any.
func (s *Service) through(
	ctx context.Context, kind, subject string, out Raw, send func(ctx context.Context, data []byte) *Error,
) *Error {
	if s.callMiddleware == nil {
		return send(ctx, out.data)
	}
	_, failure := s.sendThrough(ctx, kind, subject, out, func(ctx context.Context, data []byte) ([]byte, *Error) {
		return nil, send(ctx, data)
	})
	return failure
}

// transmit is the HandlerFunc that the innermost middleware of WithCallMiddleware calls as next.
func transmit(ctx context.Context, m *Message) ([]byte, error) {
	t, _ := ctx.Value(transmissionKey{}).(*transmission)
	if t == nil {
		return nil, errForeignCtx
	}
	data, failure := t.send(ctx, m.Data)
	t.mayHaveRun = t.mayHaveRun || failure == nil || !failure.NotRun
	return data, failure.orNil()
}

var errForeignCtx = newError(ErrInternal, "middleware must pass on the ctx that it was given, or one derived from it")

var errNotReturned = &Error{} // stands for the result of a handler until it returns; compared by identity

// typed returns the HandlerFunc that decodes the payload of a message into data, calls fn, and encodes what its result points to;
// nil stands for no answer. Error texts call the result what.
func typed[T any](what string, fn func(ctx context.Context, r *request, m *Message, data T) (result any, err error)) HandlerFunc {
	return func(ctx context.Context, m *Message) ([]byte, error) {
		r := requestOf(ctx)
		if r == noRequest {
			return nil, errForeignCtx
		}
		var data T
		c := codecFor(m.Header, m.Data, r.svc.cfg.codec)
		if err := decodePayload(c, m.Data, &data); err != nil {
			r.permanent = true
			return nil, newError(ErrInvalid, "the payload of %s is not %v", m.Subject, err)
		}
		if u, ok := c.(unsupported); ok {
			c = u.Codec
		}
		r.codec, r.ran = c, true
		result, err := fn(ctx, r, m, data)
		if err != nil || result == nil {
			return nil, err
		}
		answer, err := marshal(c, result)
		if err != nil {
			return nil, newError(ErrInternal, "encoding %s: %v", what, err)
		}
		r.codec = answer.codec
		return answer.data, nil
	}
}
