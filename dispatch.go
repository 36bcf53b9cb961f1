package aegis

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file takes a message to its handler and brings the answer back: endpoints and their workers, the handler's ctx, headers,
// middleware, and cancellation. RPC, events and commands all go through it.

// A HandlerFunc handles one message: the payload in, the payload of the answer out.
type HandlerFunc func(ctx context.Context, msg *Message) ([]byte, error)

// A Middleware wraps a handler, to check, measure or change what goes in and comes out. It must pass on the ctx that it was
// given, or one derived from it, and not return before next does. An error that it returns without calling next is one of a
// request that did not run.
type Middleware func(next HandlerFunc) HandlerFunc

// A Message is what a handler is called for, as middleware sees it. Source is the service that sent it by its own account, ""
// if unknown. Header is nil if there is none, and must not be changed.
type Message struct {
	Kind, Subject, Source string // Kind is "rpc", "event" or "command"
	Header                nats.Header
	Data                  []byte
}

// The kinds of messages.
const kindRPC, kindEvent, kindCommand, kindCall = "rpc", "event", "command", "call" // the last one only in Stats

// A source brings messages into an endpoint's queue.
type source interface {
	open(ctx context.Context) error // begins, unless drain was called
	share(on bool) error            // takes part in what the service's instances share, or does no more
	drain(ctx context.Context)      // asks for no more; what is under way still comes, until the connections are flushed
	cut(c *conn)                    // gives up what was to come by a connection that is down
	interrupt()                     // is called before the ctx of what is being handled ends
	settle()                        // is called when nothing more will come; then all is in the queue
	forget(ctx context.Context)     // is called when all is handled
	serve(m *nats.Msg, arrived time.Time)
	pending() int64 // what waits elsewhere to be brought
	done(r *request, data []byte, failure *Error)
}

// An endpoint is a handler and the workers that run it.
//
// The read loops of all connections put its messages into one channel. A few resident workers take them from there and run
// the handler right away, so that fast handlers pay for no goroutine of their own. More workers, up to the limit, are hired
// where handlers take long: ahead of need if they do so on average, else by watch, which finds workers held up. They leave when
// there is nothing to do. At the limit, watch lets as many messages wait as may run, and refuses the rest.
type endpoint struct {
	svc                 *Service
	source              source
	lease               *candidate // of an exclusive handler, else nil
	sharing             sync.Mutex // one call of share at a time
	kind, name, subject string
	run                 HandlerFunc
	limit, resident     int
	spare               int64 // bytes of the server's max_payload that an answer must leave

	queue    chan *nats.Msg  // from the source
	waiting  chan job        // those that watch lets wait; they come before the queue
	refuse   func(*nats.Msg) // what becomes of the rest; nil if the source brings no more than may run
	stopping chan struct{}   // closed when no more messages will come
	gone     chan struct{}   // closed when all are handled

	idle    atomic.Int32 // workers that wait for a message
	average atomic.Int64 // nanoseconds that the latest messages took, a moving average
	watched atomic.Bool  // watch runs
	meter   *meter

	staff   sync.WaitGroup // workers and watch; none comes when stopping is closed and all have gone
	mu      sync.Mutex     // guards the rest
	workers map[*worker]bool
}

type worker struct {
	msg   atomic.Pointer[nats.Msg] // that it handles, nil while it waits for one
	turns atomic.Uint32            // messages that it has begun
	seen  uint32                   // turns when watch looked last; this and the next are guarded by the endpoint's mu
	kept  uint32                   // turns when longRunning looked last
	long  int                      // how often it saw the same
}

type job struct {
	msg     *nats.Msg
	arrived time.Time // zero: just now
}

const (
	queueSize     = 16384            // bounds what the read loops may put down before somebody looks
	queueAlarm    = queueSize / 8    // a longer queue is too much for the machine, however fast the handler
	slowHandler   = 100_000          // nanoseconds on average that are worth a worker for each message
	watchInterval = time.Millisecond // a worker that handles one message for longer is held up
)

// register adds a handler, wrapped in the service's middleware, and opens it if the service is serving.
func (s *Service) register(e *endpoint, cfg handlerConfig) error {
	e.svc, e.meter = s, newMeter()
	e.limit = cfg.concurrency
	e.resident = min(e.limit, runtime.GOMAXPROCS(0))
	e.workers = map[*worker]bool{}
	e.average.Store(2 * slowHandler) // until it is known better
	e.queue = make(chan *nats.Msg, queueSize)
	e.waiting = make(chan job, e.limit)
	e.stopping, e.gone = make(chan struct{}), make(chan struct{})
	for _, mw := range slices.Backward(s.cfg.middleware) {
		e.run = mw(e.run)
	}

	s.mu.Lock()
	if s.state == stopping {
		defer s.mu.Unlock()
		return s.stateErrorLocked("adding " + e.name)
	}
	key := e.kind + " " + e.name
	if s.endpoints[key] != nil {
		s.mu.Unlock()
		if e.kind == kindEvent {
			return newError(ErrInvalid, "there is a subscription %q already: give a second one to %s another name by Durable", e.name, e.subject)
		}
		return newError(ErrInvalid, "%s has a handler already", e.subject)
	}
	if cfg.exclusive {
		if s.exclusive == nil {
			s.exclusive = s.newCandidate(defaultGroup, s.cfg.failover)
		}
		e.lease = s.exclusive
	}
	s.endpoints[key] = e
	serving := s.state == started
	s.mu.Unlock()

	if !serving {
		return nil
	}
	ctx, cancel := context.WithTimeout(s.base, s.cfg.timeout)
	defer cancel()
	begin := clock()
	err := e.open(ctx)
	if err == nil {
		poke(s.news)
		return errors.Join(s.runForLeader(ctx), s.allowed(ctx, begin))
	}
	s.mu.Lock()
	stopped := s.state == stopping // which sees to it
	delete(s.endpoints, key)
	s.mu.Unlock()
	if !stopped {
		e.source.drain(ctx)
		e.finish(ctx)
	}
	return err
}

func (e *endpoint) open(ctx context.Context) error {
	e.mu.Lock()
	if !isClosed(e.stopping) {
		e.hireLocked(e.resident)
	}
	e.mu.Unlock()
	if err := e.source.open(ctx); err != nil {
		return err
	}
	return e.share()
}

// share has the endpoint take part in what the service's instances share, if the instance is well and, for an exclusive handler, the
// leader. It is called whenever that may have changed.
func (e *endpoint) share() error {
	e.sharing.Lock()
	defer e.sharing.Unlock()
	return e.source.share(!e.svc.unwell.Load() && (e.lease == nil || e.lease.term.Load().holds()))
}

func (s *Service) share() {
	for _, e := range s.handlers() {
		if err := e.share(); err != nil {
			e.svc.log.Error("an endpoint isn't served", "kind", e.kind, "endpoint", e.name, "error", err)
		}
	}
}

// finish waits until all that has arrived is handled.
func (e *endpoint) finish(ctx context.Context) {
	e.source.settle()
	e.mu.Lock()
	close(e.stopping)
	e.mu.Unlock()
	e.staff.Wait()
	close(e.gone)
	e.source.forget(ctx)
}

// hireLocked starts up to n workers within the limit, and returns how many.
func (e *endpoint) hireLocked(n int) int {
	n = min(n, e.limit-len(e.workers))
	for range n {
		w := &worker{}
		e.workers[w] = true
		e.staff.Go(func() { e.work(w) })
	}
	return n
}

func (e *endpoint) work(w *worker) {
	left := false
	defer func() {
		if !left { // the handler has ended its goroutine (runtime.Goexit)
			w.msg.Store(nil)
			e.staff.Go(func() { e.work(w) })
		}
	}()
	for {
		j, ok := e.take()
		if !ok {
			break
		}
		w.turns.Add(1)
		w.msg.Store(j.msg)
		if !e.watched.Load() && e.watched.CompareAndSwap(false, true) {
			e.staff.Go(e.watch)
		}
		average := e.average.Load()
		if e.idle.Load() == 0 && average > slowHandler {
			e.mu.Lock()
			e.hireLocked(1)
			e.mu.Unlock()
		}
		begin := time.Now()
		e.source.serve(j.msg, cmp.Or(j.arrived, begin))
		e.average.Store(average + (int64(time.Since(begin))-average)/8)
		w.msg.Store(nil)
	}
	e.mu.Lock()
	delete(e.workers, w)
	e.mu.Unlock()
	left = true
}

// take waits for the next message; not ok tells the worker to leave.
func (e *endpoint) take() (j job, ok bool) {
	for {
		last := isClosed(e.stopping) // what isn't there now won't come
		select {
		case j := <-e.waiting:
			return j, true
		default:
		}
		select {
		case m := <-e.queue:
			return job{msg: m}, true
		default:
		}
		if idle := e.idle.Add(1); last || int(idle) > e.resident {
			e.idle.Add(-1)
			return job{}, false
		}
		select {
		case m := <-e.queue:
			e.idle.Add(-1)
			return job{msg: m}, true
		case j := <-e.waiting:
			e.idle.Add(-1)
			return j, true
		case <-e.stopping:
			e.idle.Add(-1)
		}
	}
}

// watch runs while no worker is idle. It sees to it that somebody takes the next message though workers are held up, and that no
// more wait than may.
func (e *endpoint) watch() {
	full := false // since no worker was free, until one is idle
	for {
		time.Sleep(watchInterval)
		e.mu.Lock()
		free := len(e.workers)
		for w := range e.workers {
			if turns := w.turns.Load(); turns != w.seen {
				w.seen = turns
			} else if w.msg.Load() != nil {
				free--
			}
		}
		if free < e.resident {
			free += e.hireLocked(e.resident - free + len(e.queue))
		}
		e.mu.Unlock()
		if full = full || free == 0 || len(e.queue) > queueAlarm; full {
			e.shed()
		}
		needless := func() bool {
			return e.idle.Load() > 0 || full && e.refuse == nil || isClosed(e.stopping) && len(e.queue)+len(e.waiting) == 0
		}
		if needless() {
			e.watched.Store(false)
			if needless() || !e.watched.CompareAndSwap(false, true) { // whoever has taken a message in between saw that it ran
				return
			}
		}
	}
}

// shed lets as many messages wait as may run at once, and refuses the rest.
func (e *endpoint) shed() {
	for e.refuse != nil && !isClosed(e.stopping) {
		select {
		case m := <-e.queue:
			select {
			case e.waiting <- job{m, time.Now()}:
			default:
				e.refuse(m)
			}
		default:
			return
		}
	}
}

// handling are the messages that workers handle now.
func (e *endpoint) handling() (msgs []*nats.Msg) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.workers {
		if m := w.msg.Load(); m != nil {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

// longRunning are the messages that workers still handle since the last look, and did not in more than most looks.
func (e *endpoint) longRunning(most int) (msgs []*nats.Msg) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.workers {
		if turns, m := w.turns.Load(), w.msg.Load(); m == nil || turns != w.kept {
			w.kept, w.long = turns, 0
		} else if w.long++; w.long <= most {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

func (e *endpoint) busy() bool {
	return len(e.queue) > 0 || len(e.waiting) > 0 || len(e.handling()) > 0
}

// logger is for what concerns one message.
func (e *endpoint) logger(r *request) *slog.Logger {
	return e.svc.log.With("kind", e.kind, "endpoint", e.name, "correlation_id", r.correlationID())
}

// admit gives a request its ctx. It is not ok if the handler is exclusive and this instance doesn't lead, or is about to resign and
// the request is one for it alone.
func (e *endpoint) admit(r *request) (ok bool) {
	r.Context = e.svc.base
	if e.lease == nil {
		return true
	}
	t := e.lease.term.Load()
	if !t.holds() || t.resigned.Err() != nil && r.msg.Subject != e.subject {
		return false
	}
	r.Context, r.term = t, t
	return true
}

// dispatch runs the handler, and hands the payload of its answer, or the error that its caller is to see, to the source's done:
// whatever the handler does, even if it panics or ends its goroutine.
func (e *endpoint) dispatch(r *request) {
	if r.lost() { // since it was admitted
		failure := e.lease.notActive()
		e.meter.ended(r.msg.Source, failure)
		r.fenced = true
		r.end()
		e.source.done(r, nil, failure)
		return
	}
	begin := e.meter.begin()
	var data []byte
	failure := errGoexit
	defer func() {
		if p := recover(); p != nil {
			failure = newError(ErrInternal, "panic in %s: %v", e.name, p)
			e.logger(r).Error("handler panicked", "error", p, "stack", string(debug.Stack()))
		}
		if failure == errGoexit {
			failure = newError(ErrInternal, "panic in %s: the handler called runtime.Goexit", e.name)
		}
		if failure == nil && r.run != nil {
			failure = r.run.whyLost()
		}
		if r.ran && r.lost() {
			r.fenced = true
			f := newError(ErrFenced, "%s lost the leadership, of term %d, while %s ran: its effect may or may not stand", e.svc.id, r.term.number, e.name)
			f.Cause = failure
			failure = f
		}
		if failure != nil {
			f := *failure
			f.Source, f.NotRun = e.svc.name, !r.ran
			failure = &f
		}
		r.end()
		e.meter.handled(r.msg.Source, begin, failure)
		e.source.done(r, data, failure)
	}()
	data, err := e.run(r, &r.msg)
	failure = asError(err)
	if limit := e.svc.conns[0].limit.Load() - e.spare; failure == nil && int64(len(data)) > limit {
		r.hopeless = true
		failure = newError(ErrInternal, "the answer of %s has %d bytes, more than the %d that the server's max_payload leaves: split it, or raise that limit", e.name, len(data), limit)
	}
}

// decode reads the payload of the message that ctx belongs to into v, and notes its codec for the answer.
func decode(ctx context.Context, m *Message, v any) (*request, error) {
	r := requestOf(ctx)
	if r == nil {
		return nil, newError(ErrInternal, "middleware must pass on the ctx that it was given, or one derived from it")
	}
	c, err := codecFor(m.Header, m.Data, r.svc.cfg.codec)
	if err == nil {
		r.codec = c
		err = c.Unmarshal(m.Data, v)
	}
	if err != nil {
		r.hopeless = true
		return nil, newError(ErrInvalid, "the payload of %s is not %T: %v", m.Subject, v, err)
	}
	r.ran = true
	return r, nil
}

var errGoexit = &Error{} // stands until the handler returns

// A request is the ctx of a handler. What costs a timer or a lock is made when it is first asked for.
type request struct {
	context.Context // the service's own
	svc             *Service
	msg             Message
	in              *nats.Msg
	reply           string
	from            address
	id              string // if the reply subject tells none
	deadline        time.Time
	packer          *packer   // holds the answer
	codec           Codec     // of the payload, once it was decoded
	hopeless        bool      // another attempt would not help
	ran             bool      // the handler was called
	delivery        *delivery // nil for a request
	run             *run      // of a command
	term            *term     // that an exclusive handler was called in
	fenced          bool      // the term was over when it returned

	mu     sync.Mutex // guards timed and cancel
	timed  context.Context
	cancel context.CancelFunc
}

type requestKey struct{}

func (r *request) Value(key any) any {
	if key == (requestKey{}) {
		return r
	}
	r.mu.Lock()
	timed := r.timed
	r.mu.Unlock()
	if timed == nil {
		return r.Context.Value(key)
	}
	return timed.Value(key)
}

func (r *request) Deadline() (time.Time, bool) { return r.deadline, true }

func (r *request) Done() <-chan struct{} { return r.live().Done() }

func (r *request) Err() error { return r.live().Err() }

// live is a ctx that ends with the deadline, with the handler, when the caller cancels, or when Stop's time is up.
func (r *request) live() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timed == nil {
		r.timed, r.cancel = context.WithDeadline(r.Context, r.deadline)
		if r.reply != "" {
			r.svc.cancels.add(r.reply, r.cancel)
		}
	}
	return r.timed
}

var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// abort ends the ctx before that.
func (r *request) abort() {
	r.live()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cancel != nil {
		r.cancel()
	}
}

// end ends the ctx, since its handler has returned.
func (r *request) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timed == nil {
		r.timed = ended
		return
	}
	r.svc.cancels.remove(r.reply)
	r.cancel()
}

// lost tells that the handler is exclusive, and its term over.
func (r *request) lost() bool { return r.term != nil && !r.term.holds() }

func requestOf(ctx context.Context) *request {
	r, _ := ctx.Value(requestKey{}).(*request)
	return r
}

const (
	headerContentType = "Content-Type"
	headerCorrelation = "Aegis-Correlation-Id"
	headerTraceParent = "traceparent" // https://www.w3.org/TR/trace-context/
	headerTraceState  = "tracestate"
)

// CorrelationID names the request that ctx belongs to, the same in each service that it passes through, for logs. In a
// handler there always is one; elsewhere it is what [WithHeader] set as Aegis-Correlation-Id, else "". An error of a call made
// without one tells the call's own in Details["correlation_id"].
func CorrelationID(ctx context.Context) string {
	if id := sent(ctx).Get(headerCorrelation); id != "" {
		return id
	}
	if r := requestOf(ctx); r != nil {
		return r.correlationID()
	}
	return ""
}

func (r *request) correlationID() string {
	if id := r.msg.Header.Get(headerCorrelation); id != "" {
		return id
	}
	if r.from.call != "" {
		return r.from.correlationID()
	}
	return r.id + r.reply
}

// Headers are those of the message that ctx's handler was called for, nil if there are none. They must not be changed.
func Headers(ctx context.Context) nats.Header {
	if r := requestOf(ctx); r != nil {
		return r.msg.Header
	}
	return nil
}

type sentKey struct{}

// WithHeader adds a header to all that is sent with the returned ctx; a later one of the same key replaces it. Of the headers
// that a handler received only the trace context (traceparent, tracestate) and the correlation id travel on by themselves. A
// key that is no HTTP token makes the call fail with [ErrInvalid].
func WithHeader(ctx context.Context, key, value string) context.Context {
	return context.WithValue(ctx, sentKey{}, withHeader(sent(ctx), key, value))
}

// withHeader is h, which is left as it is, with one header set.
func withHeader(h nats.Header, key, value string) nats.Header {
	out := make(nats.Header, len(h)+1)
	maps.Copy(out, h)
	out[key] = []string{value}
	return out
}

func sent(ctx context.Context) nats.Header {
	h, _ := ctx.Value(sentKey{}).(nats.Header)
	return h
}

// headersFor are the headers to send with ctx: those of WithHeader, and what travels on from the message being handled. The
// correlation id that can travel in the reply subject comes apart.
func headersFor(ctx context.Context) (h nats.Header, correlation string) {
	h = sent(ctx)
	r := requestOf(ctx)
	if r == nil {
		return h, ""
	}
	inherit := func(key, value string) {
		if value != "" && h[key] == nil {
			h = withHeader(h, key, value)
		}
	}
	if correlation = r.correlationID(); h[headerCorrelation] != nil || !isToken(correlation, 64) {
		inherit(headerCorrelation, correlation)
		correlation = ""
	}
	inherit(headerTraceParent, r.msg.Header.Get(headerTraceParent))
	inherit(headerTraceState, r.msg.Header.Get(headerTraceState))
	return h, correlation
}

func cancelSubject(service string) string { return "rpc." + service + ".$cancel" }

// cancels knows the handlers that watch their ctx, and the latest cancellations of requests that don't run yet.
type cancels struct {
	some  atomic.Bool
	mu    sync.Mutex // guards the rest
	watch map[string]context.CancelFunc
	early [2]map[string]bool // the latest, and those before
}

const maxEarly = 1024

// add makes cancel be called when the request with this reply subject is cancelled.
func (c *cancels) add(reply string, cancel context.CancelFunc) {
	c.mu.Lock()
	c.watch[reply] = cancel
	early := c.early[0][reply] || c.early[1][reply]
	c.mu.Unlock()
	if early {
		cancel()
	}
}

func (c *cancels) remove(reply string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.watch, reply)
}

// has tells whether the request was cancelled before it began.
func (c *cancels) has(reply string) bool {
	if !c.some.Load() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.early[0][reply] || c.early[1][reply]
}

func (c *cancels) receive(m *nats.Msg) {
	reply := string(m.Data)
	command := strings.HasPrefix(reply, commandPrefix)
	if len(reply) > 1024 || !command && parseAddress(reply).budget == 0 {
		return // not a caller's
	}
	c.mu.Lock()
	cancel := c.watch[reply]
	if cancel == nil && !command {
		if c.early[0] == nil || len(c.early[0]) >= maxEarly {
			c.early = [2]map[string]bool{{}, c.early[0]}
		}
		c.early[0][reply] = true
		c.some.Store(true)
	}
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}
