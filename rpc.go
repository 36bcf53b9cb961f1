package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has typed RPC: Handle, Call, CallAll, and the circuit breaker.
//
// A call goes through these functions:
//
//	Call → call → newCall (encodes the request, checks the options)
//	     → callWith (counts the call, decodes the answer)
//	     → exchangeCall, through the middleware of WithCallMiddleware if there is any (callThrough)
//	     → withRetries → attempt (asks the circuit breaker, interprets the failure)
//	     → sendCall (chooses the subject) → request, in request.go
//
// On the other side, the read loop of a connection puts the request into the endpoint's queue, and a worker (dispatch.go) calls
// serve, which refuses the request or calls dispatch. dispatch runs the handler and calls done, which sends the answer.

// Handle makes fn the handler of a method of the service. fn is called with the value of each request, on a goroutine of the
// library, up to [Concurrency] at once in each instance. method is a letter, then letters, digits and _, at most 128 characters.
// Before [Service.Start], Handle does not block. After Start, Handle returns when the servers know the method, and blocks for
// [WithTimeout] at most.
//
// An [*Error] that fn returns, or that fn's error wraps, arrives at the caller with its code. [context.DeadlineExceeded] arrives
// as [ErrTimeout], and [context.Canceled] as [ErrCanceled]. Any other error, and a panic, arrives as [ErrInternal] with its text.
// A payload that can't be decoded into Req is answered with [ErrInvalid].
//
// fn's ctx ends at the caller's deadline, or after WithTimeout if the request has none, and when the caller cancels. A caller
// that does not use aegis can send its time limit in the header Aegis-Timeout, as a Go duration (1.5s) or in milliseconds. A
// request whose caller has given up before a handler was free is dropped.
//
// Errors, which Start returns too if Handle was called before it:
//   - [ErrInvalid] if method or an option is invalid, if fn is nil, or if the method has a handler already
//   - [ErrClosed] after Stop
//   - after Start, those of [Service.Start]
func Handle[Req, Resp any](s *Service, method string, fn func(context.Context, Req) (Resp, error), opts ...HandlerOption) error {
	if fn == nil {
		return s.noteRegistration(newError(ErrInvalid, "method %q: its function is nil", method))
	}
	handler := typed("the answer of "+method, func(ctx context.Context, _ *request, _ *Message, in Req) (any, error) {
		resp, err := fn(ctx, in)
		return &resp, err
	})
	return s.noteRegistration(s.handle(method, handler, opts))
}

func (s *Service) handle(method string, handler HandlerFunc, opts []HandlerOption) error {
	cfg, failure := s.newHandlerConfig(kindRPC, opts)
	if failure = cmp.Or(checkNames(s.name, "method", method), failure); failure != nil {
		return failure
	}
	e := &endpoint{kind: kindRPC, name: method, subject: "rpc." + s.name + "." + method, handler: handler}
	src := &rpcSource{endpoint: e, direct: map[*conn]*nats.Subscription{}, shared: map[*conn]*nats.Subscription{}}
	e.source = src
	overloaded := notRun(newError(ErrOverloaded, "%s runs %d requests, its limit, and as many wait", e.subject, cfg.concurrency))
	overloaded.Source = s.name
	e.reject = func(m *nats.Msg) {
		e.meter.shed.Add(1)
		src.refuse(m, parseAddress(m.Reply).service, overloaded)
	}
	return s.addEndpoint(e, cfg)
}

var errExpiredEarly = newError(ErrTimeout, "its caller gave up before a handler was free")
var errCanceledEarly = newError(ErrCanceled, "its caller cancelled before a handler was free")

// An rpcSource is the source of an endpoint's requests. They come on two subjects: the method's, which the instances of the
// service share, and the method's subject for this instance.
type rpcSource struct {
	*endpoint

	mu             sync.Mutex                   // guards the rest
	direct, shared map[*conn]*nats.Subscription // to the subject for this instance, and to the shared one, by connection
	drained        bool
}

// open subscribes to the subject for this instance.
func (src *rpcSource) open(context.Context) error {
	src.mu.Lock()
	defer src.mu.Unlock()
	return src.subscribeLocked(src.direct, src.subject+"."+src.svc.id)
}

// share subscribes to the shared subject, or ends these subscriptions.
func (src *rpcSource) share(on bool) error {
	src.mu.Lock()
	defer src.mu.Unlock()
	switch {
	case len(src.direct) == 0: // open was not called yet
	case on && len(src.shared) == 0 && !src.drained:
		return src.subscribeLocked(src.shared, src.subject)
	case !on:
		src.endLocked(src.shared)
		src.shared = map[*conn]*nats.Subscription{} // a new map, because drain may be reading the old one
	}
	return nil
}

func (src *rpcSource) subscribeLocked(subs map[*conn]*nats.Subscription, subject string) error {
	for _, c := range src.svc.conns {
		if src.drained {
			return src.svc.closedError()
		}
		sub, err := c.nc.ChanQueueSubscribe(subject, src.svc.name, src.queue)
		if err != nil {
			return newError(ErrUnavailable, "subscribing to %s: %v", subject, err)
		}
		subs[c] = sub
	}
	return nil
}

// endLocked ends subscriptions. Messages that the server has sent already still reach the queue. If a connection is down, there
// are none, and its subscription ends at once, because otherwise it would come back with the connection.
func (src *rpcSource) endLocked(subs map[*conn]*nats.Subscription) {
	for c, sub := range subs {
		if c.up.Load() {
			_ = sub.Drain() // fails only on a closed connection
		} else {
			_ = sub.Unsubscribe() // likewise
		}
	}
}

// drain ends all subscriptions and waits until everything that the server sent before is in the queue.
func (src *rpcSource) drain(ctx context.Context) {
	src.mu.Lock()
	src.drained = true
	src.endLocked(src.direct)
	src.endLocked(src.shared)
	direct, shared := src.direct, src.shared
	src.mu.Unlock()
	for _, c := range src.svc.conns {
		// The answer to a flush comes after all that the server sent before it ended the subscriptions.
		if c.flush(ctx) != nil {
			// Otherwise they would come back with the connection. This fails only on a closed connection, or if there is none.
			_ = direct[c].Unsubscribe()
			_ = shared[c].Unsubscribe()
		}
	}
}

// pending returns 0, because the server keeps no requests.
func (src *rpcSource) pending() int64 { return 0 }

// serve handles one request and answers it.
func (src *rpcSource) serve(m *nats.Msg, arrived time.Time) {
	from, malformed := callerOf(m)
	msg := Message{Kind: src.kind, Subject: m.Subject, Source: from.service, Header: m.Header, Data: m.Data}
	r := &request{svc: src.svc, msg: msg, in: m, reply: m.Reply, from: from}
	r.deadline = arrived.Add(cmp.Or(from.budget, src.svc.cfg.timeout))
	if m.Reply == "" {
		r.id = rand.Text()
	}
	switch {
	case malformed != nil:
		src.refuse(m, r.msg.Source, malformed)
	case time.Until(r.deadline) <= 0:
		src.meter.expired.Add(1)
		src.meter.count(r.msg.Source, errExpiredEarly)
	case src.svc.cancels.has(m.Reply):
		src.meter.expired.Add(1)
		src.meter.count(r.msg.Source, errCanceledEarly)
	case src.svc.timeUp.Load():
		stopping := notRun(newError(ErrUnavailable, "instance %s is stopping", src.svc.id))
		stopping.Source = src.svc.name
		src.refuse(m, r.msg.Source, stopping)
	case !src.admit(r):
		src.refuse(m, r.msg.Source, src.candidate.notActive())
	default:
		src.dispatch(r)
	}
}

// refuse answers a request that no handler has seen.
func (src *rpcSource) refuse(m *nats.Msg, from string, failure *Error) {
	src.meter.count(from, failure)
	src.answer(m, nil, nil, failure)
}

// done answers a request that a handler has handled.
func (src *rpcSource) done(r *request, data []byte, failure *Error) {
	src.answer(r.in, r.codec, data, failure)
}

// answer answers m with data, or with a failure, in the codec c. If c is nil, because the request was not decoded, a failure is
// encoded in the format that the request seems to have.
func (src *rpcSource) answer(m *nats.Msg, c Codec, data []byte, failure *Error) {
	if m.Reply == "" {
		return
	}
	c = cmp.Or(c, sniff(m.Data))
	out := &nats.Msg{Subject: m.Reply, Data: data}
	if failure != nil {
		out.Header, out.Data = failure.encode(c)
	} else if label := labelOf(c); label != "" {
		out.Header = nats.Header{headerContentType: {label}}
	} else if isPubAck(out) { // without a label, the caller would take it for the acknowledgement of a stream, and go on waiting
		c = cmp.Or(c, JSON) // c is nil if middleware has answered an empty request
		out.Header = nats.Header{headerContentType: {c.ContentType()}}
	}
	err := src.send(m, out)
	if errors.Is(err, nats.ErrMaxPayload) {
		tooLarge := newError(cmp.Or(failure, ErrInternal), "the answer of %s has %d bytes, more than the server's max_payload of %d: "+
			"split it, or raise that limit", src.name, len(out.Data), src.svc.Conn().MaxPayload())
		tooLarge.Source, tooLarge.NotRun = src.svc.name, failure != nil && failure.NotRun
		out.Header, out.Data = tooLarge.encode(c)
		err = src.send(m, out)
	}
	if isDisconnected(err) {
		err = errors.New("the connection to the server is lost")
	}
	if err != nil {
		r := &request{msg: Message{Header: m.Header}, from: parseAddress(m.Reply), reply: m.Reply}
		src.logOften(r, slog.LevelWarn, "an answer was lost", "error", err)
	}
}

// send publishes the answer to m on the connection that m came by, because the servers of others may not know the caller's inbox
// yet. If that connection is lost, send uses any other.
func (src *rpcSource) send(m, out *nats.Msg) error {
	err := m.RespondMsg(out)
	if isDisconnected(err) {
		if c := src.svc.pick(); c != nil {
			err = c.nc.PublishMsg(out)
		}
	}
	return err
}

// isDisconnected reports whether nats.go has not sent a message because its connection is down.
func isDisconnected(err error) bool {
	return errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrDisconnected) ||
		errors.Is(err, nats.ErrConnectionClosed)
}

// Call calls a method of a service and waits for its answer, until ctx ends, or for [WithTimeout] if ctx has no deadline. The
// time that is left is sent with the request, and limits the handler's ctx. When ctx is cancelled, the handler's ctx is
// cancelled too.
//
// The error is an [*Error]. Call returns it as soon as it is known.
//
// Errors:
//   - that of the handler
//   - [ErrInvalid] if a name, an option or a header is invalid, or if the request can't be encoded or decoded, or is larger than
//     the server's max_payload
//   - [ErrUnavailable] if there is no connection or no instance, or if the connection was lost while Call waited
//   - [ErrUnimplemented] if the service has no such method
//   - [ErrNotActive] if the handler is [Exclusive], and no instance leads or the instance that got the request does not lead
//   - [ErrFenced] if the handler is Exclusive, and its instance lost the leadership while the handler ran
//   - [ErrTimeout] or [ErrCanceled] if ctx has ended, or [ErrTimeout] if ctx has no deadline and WithTimeout is over
//   - [ErrOverloaded] if the handler is at its limit, or if this service has as many calls in flight as its connections can carry
//     ([WithPool]), or as the server's max_subscriptions allows
//   - [ErrCircuitOpen] if the circuit breaker of the service is open ([WithBreaker])
//   - [ErrInternal] if the handler returned an error that is not an *Error, or panicked, or if its answer can't be encoded or
//     decoded
//   - [ErrDenied] if the server's permissions do not allow sending the request or receiving its answer
//   - [ErrClosed] if s was stopped
//
// Call has three limits. First, the time that a request spends in the sockets of a paused process is not counted, so that a
// handler may run after the deadline by that time. If that must not happen, put an expiry time into the request. Second, a caller
// does not learn that the instance which handles its call was killed, and waits until ctx ends. Use short deadlines, or
// [Idempotent]. Third, if something else subscribes to the method's subject and does not answer, such as a stream over rpc.> that
// keeps an audit log, a call to a service that does not run fails only when ctx ends.
func Call[Req, Resp any](ctx context.Context, s *Service, service, method string, req Req, opts ...CallOption) (Resp, error) {
	v := &struct { // so that both are one allocation
		req  Req
		resp Resp
	}{req: req}
	if failure := s.call(ctx, service, method, &v.req, &v.resp, opts); failure != nil {
		var zero Resp
		return zero, failure
	}
	return v.resp, nil
}

// An Answer is the answer of one instance to a [CallAll].
type Answer[T any] struct {
	Instance string // the id of the instance that was called
	Data     T      // the answer, or the zero value if the call of this instance has failed
}

// CallAll calls a method of every instance of a service at once, and yields the answer or the error of each instance as it comes.
// It calls all instances that the registry lists, except those that are STOPPING. Each of these calls has the time limit and the
// errors of [Call]. If the handler is [Exclusive], an instance that does not lead answers [ErrNotActive]. If the loop is left
// early, the calls that have no answer yet are cancelled. The iteration returns when all calls have ended.
//
// If no call can be made, CallAll yields a single error, with the zero Answer.
//
// Errors if no call can be made:
//   - [ErrUnavailable] if the service has no instances
//   - [ErrInvalid] if a name or an option is invalid, if the request can't be encoded, or for the options [Sticky], [ToInstance]
//     and [Balance]
//   - those of [Service.Discover]
func CallAll[Req, Resp any](
	ctx context.Context, s *Service, service, method string, req Req, opts ...CallOption,
) iter.Seq2[Answer[Resp], error] {
	return func(yield func(Answer[Resp], error) bool) {
		each := func(ctx context.Context, instance string, out Raw, cfg *callConfig) func() bool {
			a := Answer[Resp]{Instance: instance}
			failure := s.callWith(ctx, service, method, out, &a.Data, cfg)
			if failure != nil {
				a.Data = *new(Resp)
			}
			return func() bool { return yield(a, failure.orNil()) }
		}
		if failure := s.callAll(ctx, service, method, &req, opts, each); failure != nil {
			yield(Answer[Resp]{}, failure)
		}
	}
}

// callAll runs each for every instance of a service, each on a goroutine of its own, and then calls the functions that they
// return, one after another, until one returns false. Before it returns, it waits for all goroutines.
func (s *Service) callAll(
	ctx context.Context, service, method string, req any, opts []CallOption,
	each func(ctx context.Context, instance string, out Raw, cfg *callConfig) func() bool,
) *Error {
	out, cfg, failure := s.newCall(service, method, req, opts)
	if failure != nil {
		return failure
	}
	if cfg.sticky || cfg.instance != nil || cfg.strategy != nil {
		return notRun(newError(ErrInvalid, "CallAll of %s.%s: it calls all instances: Sticky, ToInstance and Balance are for Call",
			service, method))
	}
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return failure
	}
	instances := d.instances(d.snapshot())
	instances = slices.DeleteFunc(instances, func(i Instance) bool { return i.Status == statusStopping })
	if len(instances) == 0 {
		return notRun(newError(ErrUnavailable, "the service %s has no instances in the registry", service))
	}
	ctx, cancel := context.WithCancel(ctx)
	results := make(chan func() bool, len(instances))
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	for _, i := range instances {
		cfg := *cfg
		cfg.instance = &i.ID
		calls.Go(func() { results <- each(ctx, i.ID, out, &cfg) })
	}
	for range instances {
		if !(<-results)() {
			break
		}
	}
	return nil
}

// call sends what req points to, and decodes the answer into what resp points to.
func (s *Service) call(ctx context.Context, service, method string, req, resp any, opts []CallOption) *Error {
	out, cfg, failure := s.newCall(service, method, req, opts)
	if failure != nil {
		return failure
	}
	return s.callWith(ctx, service, method, out, resp, cfg)
}

// newCall encodes the request of a call, and checks its names and options.
func (s *Service) newCall(service, method string, req any, opts []CallOption) (Raw, *callConfig, *Error) {
	out, err := marshal(s.cfg.codec, req)
	if err != nil {
		return out, nil, notRun(newError(ErrInvalid, "encoding the request of %s.%s: %v", service, method, err))
	}
	cfg, failure := newCallConfig(kindRPC, opts)
	return out, cfg, cmp.Or(checkNames(service, "method", method), failure)
}

// callWith sends an encoded request, and decodes the answer into what resp points to.
func (s *Service) callWith(ctx context.Context, service, method string, out Raw, resp any, cfg *callConfig) (failure *Error) {
	subject := "rpc." + service + "." + method
	meter := s.calls.get(subject[len("rpc."):], newMeter)
	begin := meter.begin()
	defer func() { meter.finish("", begin, failure) }()
	var answer *nats.Msg
	if s.callMiddleware == nil {
		answer, failure = s.exchangeCall(ctx, subject, service, out, cfg)
	} else {
		answer, failure = s.callThrough(ctx, subject, service, out, cfg)
	}
	if failure != nil {
		return failure
	}
	if len(answer.Data) == 0 { // from a service that does not use aegis
		return nil
	}
	if err := decodePayload(codecFor(answer.Header, answer.Data, s.cfg.codec), answer.Data, resp); err != nil {
		return newError(ErrInternal, "the answer of %s.%s is not %v", service, method, err)
	}
	return nil
}

// callThrough calls exchangeCall through the middleware of WithCallMiddleware.
func (s *Service) callThrough(ctx context.Context, subject, service string, out Raw, cfg *callConfig) (*nats.Msg, *Error) {
	answer := &nats.Msg{}
	data, failure := s.sendThrough(ctx, kindCall, subject, out, func(ctx context.Context, data []byte) ([]byte, *Error) {
		got, failure := s.exchangeCall(ctx, subject, service, Raw{data, out.codec}, cfg)
		if failure != nil {
			return nil, failure
		}
		answer.Header = got.Header
		return got.Data, nil
	})
	answer.Data = data
	return answer, failure
}

// exchangeCall sends a request, in as many attempts as cfg allows, and returns the answer.
func (s *Service) exchangeCall(ctx context.Context, subject, service string, out Raw, cfg *callConfig) (*nats.Msg, *Error) {
	x := exchange{subject: subject, data: out.data}
	x.header, x.correlation = headersFor(ctx)
	if label := labelOf(out.codec); label != "" {
		x.header = withHeader(x.header, headerContentType, label)
	}
	if x.sendTimeout = s.cfg.wireHeaders; x.sendTimeout {
		if x.header[headerCorrelation] == nil {
			x.correlation = cmp.Or(x.correlation, rand.Text())
			x.header = withHeader(x.header, headerCorrelation, x.correlation)
		}
		x.header = withHeader(x.header, headerSource, s.name)
	}
	b := s.breaker(service)
	return s.withRetries(ctx, &x, cfg, func() (*nats.Msg, *Error, bool) { return s.attempt(ctx, &x, b, service, cfg) })
}

// attempt sends the call once, if the circuit breaker lets it through. again reports whether the caller's options allow another
// attempt after this failure.
func (s *Service) attempt(
	ctx context.Context, x *exchange, b *breaker, service string, cfg *callConfig,
) (answer *nats.Msg, failure *Error, again bool) {
	probe, wait := b.admit()
	if wait > 0 {
		return nil, notRun(newError(ErrCircuitOpen, "%s failed %d times in a row; next attempt in %v",
			service, b.policy.Failures, wait)), true
	}
	answer, instance, failure := s.sendCall(ctx, x, service, cfg)
	answered := failure == nil || failure == errNoResponders // which is the server's answer
	switch failure {
	case nil:
		if failure = decodeError(answer); failure != nil {
			failure.Source = cmp.Or(failure.Source, service) // a service that does not use aegis does not name itself
		}
	case errNoResponders:
		failure = s.explainNoResponders(ctx, x, service, instance)
	}
	if failure == nil {
		b.report(probe, good)
		return answer, nil, false
	}
	if cfg.sticky && failure.Code == ErrNotActive.Code && failure.NotRun && failure.Source == service {
		s.leaderWatchOf(service).correct(instance, failure)
	}
	if failure.Code == ErrCanceled.Code && !answered && !failure.NotRun {
		s.notify(cancelSubject(service), []byte(x.reply))
	}
	b.report(probe, verdictOn(failure, answered))
	return nil, failure, safeToResend(failure) || cfg.idempotent && !answered && isUnanswered(failure)
}

// verdictOn returns what a failure says about the service that was called. answered is whether an answer came, be it the
// server's that there are no responders.
func verdictOn(failure *Error, answered bool) verdict {
	switch {
	case failure.Code == ErrNotActive.Code: // the service runs, but another instance leads
		return inconclusive
	case answered && safeToResend(failure): // there is no instance, or it is overloaded or stopping
		return bad
	case answered: // the handler has answered with an error
		return good
	case failure.Code == ErrTimeout.Code && !failure.NotRun: // no answer came in time
		return bad
	}
	return inconclusive // the caller has cancelled, or its own connection has failed
}

// sendCall sends the call once, to the subject that the options ask for. If that is the subject of the instance of ToInstance or,
// for Sticky, of the leader, it returns that instance's id, else "".
func (s *Service) sendCall(
	ctx context.Context, x *exchange, service string, cfg *callConfig,
) (answer *nats.Msg, instance string, failure *Error) {
	instance = deref(cfg.instance)
	if instance == "" && cfg.sticky {
		instance = s.leaderOf(ctx, service)
	}
	switch {
	case instance != "":
		if cfg.instance == nil {
			w := s.elections.hold(service + "." + defaultGroup)
			defer w.use.release()
			x.term = w.termOf(instance)
		}
		answer, failure = s.requestFrom(ctx, x, service, instance)
		x.term = nil                                           // what is sent next may go to another instance
		if failure == errNoResponders && cfg.instance == nil { // the leader is gone, and another instance may lead now
			answer, failure = s.request(ctx, x)
			instance = ""
		}
	case cfg.strategy != nil:
		answer, failure = s.requestAny(ctx, x, service, *cfg.strategy)
	default:
		answer, failure = s.request(ctx, x)
	}
	return answer, instance, failure
}

// requestFrom sends x to one instance of a service.
func (s *Service) requestFrom(ctx context.Context, x *exchange, service, instance string) (*nats.Msg, *Error) {
	shared := x.subject
	x.subject += "." + instance
	key := service + "." + instance
	s.inFlight.add(key, 1)
	answer, failure := s.request(ctx, x)
	s.inFlight.add(key, -1)
	x.subject = shared
	return answer, failure
}

// A breaker is the circuit breaker in front of one service.
type breaker struct {
	policy BreakerPolicy

	mu       sync.Mutex // guards the rest
	failures int        // in a row
	until    time.Time  // the end of the cooldown; zero while the breaker is closed
	probing  bool       // whether a probe is under way
}

// A verdict is what the end of a call says about the service.
type verdict int

const inconclusive, good, bad verdict = 0, 1, 2

const maxBreakers = 1024

// breaker returns the circuit breaker in front of a service. It is nil, which lets every call through, without WithBreaker, and
// if there are too many breakers already.
func (s *Service) breaker(service string) *breaker {
	if s.cfg.breaker.Failures == 0 {
		return nil
	}
	if s.breakers.count.Load() >= maxBreakers { // concurrent calls may exceed that by a few
		known, _ := s.breakers.values.Load(service)
		b, _ := known.(*breaker)
		return b
	}
	return s.breakers.get(service, func() *breaker { return &breaker{policy: s.cfg.breaker} })
}

const breakerClosed, breakerOpen = "closed", "open" // states of a breaker, as Stats shows them

// state returns the state of the breaker, as Stats shows it.
func (b *breaker) state() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.until.IsZero():
		return breakerClosed
	case time.Until(b.until) > 0:
		return breakerOpen
	}
	return "half-open"
}

// admit returns 0 if a call may go out, and whether it is the probe. Otherwise it returns how long the call has to wait.
func (b *breaker) admit() (probe bool, wait time.Duration) {
	if b == nil {
		return false, 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch wait := time.Until(b.until); {
	case b.until.IsZero():
		return false, 0
	case wait > 0:
		return false, wait
	case b.probing:
		return false, b.policy.Cooldown
	}
	b.probing = true
	return true, 0
}

// report takes the result of a call that admit let through.
func (b *breaker) report(probe bool, v verdict) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if probe {
		b.probing = false
	} else if !b.until.IsZero() {
		return // the call was sent before the breaker opened
	}
	switch v {
	case good:
		b.failures, b.until = 0, time.Time{}
	case bad:
		if b.failures++; b.failures >= b.policy.Failures {
			b.until = time.Now().Add(b.policy.Cooldown)
		}
	}
}
