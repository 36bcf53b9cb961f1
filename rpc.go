package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file is typed RPC: a handler's side (Handle), a caller's side (Call), and the circuit breaker.

// Handle serves a method: fn is called with each request's value, on a goroutine of the library, several at once up to the
// handler's [Concurrency]. method is [A-Za-z][A-Za-z0-9_]*. It may be added before or after Start; after it, Handle returns
// once the servers know it.
//
// An [*Error] that fn returns, also one wrapped by %w, arrives at the caller with its code; any other error as [ErrInternal]
// with its message, like a panic. A payload that can't be decoded into Req is answered with [ErrInvalid]. fn's ctx ends with
// the caller's deadline; a request whose caller has given up while it waited is dropped.
//
// Handle fails with [ErrInvalid] if the name or an option is out of range or the method has a handler already, with
// [ErrClosed] after Stop.
func Handle[Req, Resp any](s *Service, method string, fn func(context.Context, Req) (Resp, error), opts ...HandlerOption) error {
	if fn == nil {
		return newError(ErrInvalid, "method %q: its function is nil", method)
	}
	return s.handle(method, func(ctx context.Context, m *Message) ([]byte, error) {
		var req Req
		r, err := decode(ctx, m, &req)
		if err != nil {
			return nil, err
		}
		resp, err := fn(ctx, req)
		if err != nil {
			return nil, err
		}
		data, p, err := marshal(r.codec, &resp)
		if err != nil {
			return nil, newError(ErrInternal, "encoding the answer of %s: %v", method, err)
		}
		r.packer = p
		return data, nil
	}, opts)
}

func (s *Service) handle(method string, run HandlerFunc, opts []HandlerOption) error {
	if failure := checkNames(s.name, "method", method); failure != nil {
		return failure
	}
	cfg, err := s.handlerConfig(kindRPC, opts)
	if err != nil {
		return err
	}
	e := &endpoint{kind: kindRPC, name: method, subject: "rpc." + s.name + "." + method, run: run}
	q := &subjects{endpoint: e}
	q.byConn.Store(&map[*nats.Subscription]*conn{})
	e.source = q
	overloaded := notRun(newError(ErrOverloaded, "%s runs %d requests, its limit, and as many wait", e.subject, cfg.concurrency))
	overloaded.Source = s.name
	e.refuse = func(m *nats.Msg) {
		e.meter.shed.Add(1)
		q.turnAway(m, parseAddress(m.Reply).service, overloaded)
	}
	return s.register(e, cfg)
}

// subjects is where requests come from: the service's subject of the method, and the instance's own, on every connection.
type subjects struct {
	*endpoint
	byConn atomic.Pointer[map[*nats.Subscription]*conn]

	mu          sync.Mutex // guards the rest
	own, shared []*nats.Subscription
	drained     bool // subscribe no more
}

func (q *subjects) open(context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.subscribeLocked(&q.own, q.subject+"."+q.svc.id)
}

func (q *subjects) share(on bool) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case len(q.own) == 0: // it isn't open yet
	case on && len(q.shared) == 0 && !q.drained:
		return q.subscribeLocked(&q.shared, q.subject)
	case !on:
		q.endLocked(q.shared)
		q.shared = nil
	}
	return nil
}

func (q *subjects) subscribeLocked(to *[]*nats.Subscription, subject string) error {
	byConn := maps.Clone(*q.byConn.Load())
	maps.DeleteFunc(byConn, func(sub *nats.Subscription, _ *conn) bool { return !sub.IsValid() }) // of a leadership before
	defer q.byConn.Store(&byConn)
	for _, c := range q.svc.conns {
		if q.drained {
			return q.svc.closedError()
		}
		sub, err := c.nc.ChanQueueSubscribe(subject, q.svc.name, q.queue)
		if err != nil {
			return newError(ErrUnavailable, "subscribing to %s: %v", subject, err)
		}
		*to = append(*to, sub)
		byConn[sub] = c
	}
	return nil
}

// endLocked ends subscriptions, after what the server has sent already. One whose connection is down would only come back with it.
func (q *subjects) endLocked(subs []*nats.Subscription) {
	for _, sub := range subs {
		if c := (*q.byConn.Load())[sub]; c.up.Load() {
			_ = sub.Drain() // fails only on a closed connection
		} else {
			_ = sub.Unsubscribe() // likewise
		}
	}
}

func (q *subjects) drain(context.Context) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.drained = true
	q.endLocked(q.own)
	q.endLocked(q.shared)
}

// cut ends the subscriptions on c, so that they don't come back when it does.
func (q *subjects) cut(c *conn) {
	for sub, on := range *q.byConn.Load() {
		if on == c {
			_ = sub.Unsubscribe() // fails only on a closed connection
		}
	}
}

func (q *subjects) interrupt() {}

func (q *subjects) settle() {}

func (q *subjects) pending() int64 { return 0 }

func (q *subjects) forget(context.Context) {}

// serve handles one request and answers it.
func (q *subjects) serve(m *nats.Msg, arrived time.Time) {
	r := &request{
		svc:   q.svc,
		msg:   Message{Kind: q.kind, Subject: m.Subject, Header: m.Header, Data: m.Data},
		in:    m,
		reply: m.Reply,
		from:  parseAddress(m.Reply),
	}
	r.msg.Source = r.from.service
	if m.Reply == "" {
		r.id = rand.Text()
	}
	r.deadline = arrived.Add(cmp.Or(r.from.budget, q.svc.cfg.timeout))
	switch {
	case time.Until(r.deadline) <= 0:
		q.meter.expired.Add(1)
		q.meter.ended(r.msg.Source, errExpired)
	case q.svc.cancels.has(m.Reply):
		q.meter.expired.Add(1)
		q.meter.ended(r.msg.Source, errCancelled)
	case q.svc.draining.Load():
		q.turnAway(m, r.msg.Source, &Error{Code: ErrUnavailable.Code, Message: "instance " + q.svc.id + " is stopping", Source: q.svc.name, NotRun: true})
	case !q.admit(r):
		q.turnAway(m, r.msg.Source, q.lease.notActive())
	default:
		q.dispatch(r)
	}
}

var (
	errExpired   = newError(ErrTimeout, "its caller gave up before a handler was free")
	errCancelled = newError(ErrCanceled, "its caller cancelled before a handler was free")
)

// turnAway answers what no handler has seen.
func (q *subjects) turnAway(m *nats.Msg, from string, failure *Error) {
	q.meter.ended(from, failure)
	q.answer(m, nil, nil, failure)
}

// done answers what a handler has handled.
func (q *subjects) done(r *request, data []byte, failure *Error) {
	q.answer(r.in, r.codec, data, failure)
	if len(q.svc.cfg.middleware) == 0 { // which may have kept the data
		r.packer.release()
	}
}

// answer sends a handler's answer, or a failure, in c; that is nil if the payload was not decoded.
func (q *subjects) answer(m *nats.Msg, c Codec, data []byte, failure *Error) {
	if m.Reply == "" {
		return
	}
	if failure != nil && c == nil {
		c = sniff(m.Data)
	}
	out := &nats.Msg{Subject: m.Reply, Data: data}
	if failure != nil {
		out.Header, out.Data = failure.encode(c)
	} else if c != nil {
		if label := contentType(c, data); label != "" {
			out.Header = nats.Header{headerContentType: {label}}
		}
	}
	err := q.send(m.Sub, out)
	if errors.Is(err, nats.ErrMaxPayload) {
		tooLarge := newError(ErrInternal, "the answer of %s has %d bytes, more than the server's max_payload of %d: split it, or raise that limit",
			q.name, len(out.Data), q.svc.Conn().MaxPayload())
		if failure != nil {
			tooLarge.Code, tooLarge.NotRun = failure.Code, failure.NotRun
		}
		tooLarge.Source = q.svc.name
		out.Header, out.Data = tooLarge.encode(c)
		err = q.send(m.Sub, out)
	}
	if err != nil {
		q.svc.log.Warn("an answer was lost", "endpoint", q.name, "correlation_id", cmp.Or(m.Header.Get(headerCorrelation), parseAddress(m.Reply).correlationID()), "error", err)
	}
}

// send publishes an answer on the connection that the request came by: others may not know the caller's inbox yet. If that
// connection is gone, another will do.
func (q *subjects) send(sub *nats.Subscription, out *nats.Msg) error {
	var err error = nats.ErrDisconnected
	if c := (*q.byConn.Load())[sub]; c != nil {
		err = c.nc.PublishMsg(out)
	}
	if errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrDisconnected) || errors.Is(err, nats.ErrConnectionClosed) {
		if c := q.svc.pick(); c != nil {
			err = c.nc.PublishMsg(out)
		}
	}
	return err
}

// Call calls a method of a service and waits for its answer, until ctx ends, or for [WithTimeout] if ctx has no deadline. The
// time that is left travels along and bounds the handler's ctx; when ctx is cancelled, so is the handler's.
//
// The error is an [*Error]: the handler's, or one of these. [ErrInvalid]: a name, option or header is out of range, the
// request can't be encoded or is larger than the server's max_payload. [ErrUnavailable]: no connection, no instance, or the
// connection was lost while waiting. [ErrUnimplemented]: the service has no such method. [ErrNotActive], [ErrFenced]: see
// [Exclusive]. [ErrTimeout], [ErrCanceled]: ctx ended. [ErrOverloaded]: the handler is at its limit. [ErrCircuitOpen]: see
// [WithBreaker]. [ErrInternal]: the handler failed, or its answer can't be decoded. [ErrDenied]: the server's permissions don't allow
// the call, or to hear its answer. [ErrClosed]: s was stopped. All but those of ctx come at once.
func Call[Req, Resp any](ctx context.Context, s *Service, service, method string, req Req, opts ...CallOption) (Resp, error) {
	var resp, zero Resp
	data, buf, err := marshal(s.cfg.codec, &req)
	if err != nil {
		return zero, notRun(newError(ErrInvalid, "encoding the request of %s.%s: %v", service, method, err))
	}
	failure := s.call(ctx, service, method, data, buf, opts, func(answer *nats.Msg) error {
		if len(answer.Data) == 0 { // from a service that isn't aegis
			return nil
		}
		c, err := codecFor(answer.Header, answer.Data, s.cfg.codec)
		if err == nil {
			err = c.Unmarshal(answer.Data, &resp)
		}
		if err != nil {
			return fmt.Errorf("%T: %w", resp, err)
		}
		return nil
	})
	if failure != nil {
		return zero, failure
	}
	return resp, nil
}

// call sends data, which buf holds, and has the answer decoded.
func (s *Service) call(ctx context.Context, service, method string, data []byte, buf *packer, opts []CallOption, decode func(*nats.Msg) error) (failure *Error) {
	cfg := newCallConfig(kindRPC, opts)
	if failure := cmp.Or(checkNames(service, "method", method), cfg.err); failure != nil {
		return failure
	}
	x := exchange{subject: "rpc." + service + "." + method, data: data}
	x.header, x.correlation = headersFor(ctx)
	if label := contentType(s.cfg.codec, data); label != "" {
		x.header = withHeader(x.header, headerContentType, label)
	}
	breaker := s.breaker(service)
	meter := s.calls.get(x.subject[len("rpc."):], newMeter)
	begin := meter.begin()
	defer func() { meter.handled("", begin, failure) }()
	answer, failure := s.persist(ctx, &x, cfg, buf, func() (*nats.Msg, *Error, bool) {
		return s.attempt(ctx, &x, breaker, service, cfg)
	})
	if failure != nil {
		return failure
	}
	if err := decode(answer); err != nil {
		return newError(ErrInternal, "the answer of %s.%s is not %v", service, method, err)
	}
	return nil
}

// attempt sends the call once; again tells whether the caller's options allow to send it once more.
func (s *Service) attempt(ctx context.Context, x *exchange, b *breaker, service string, cfg *callConfig) (answer *nats.Msg, failure *Error, again bool) {
	probe, left := b.admit()
	if left > 0 {
		return nil, notRun(newError(ErrCircuitOpen, "%s failed %d times in a row; next attempt in %v", service, b.policy.Failures, left)), true
	}
	answer, instance, failure := s.address(ctx, x, service, cfg)
	answered := failure == nil
	if answered {
		failure = decodeError(answer)
	}
	if failure == nil {
		b.report(probe, good)
		return answer, nil, false
	}
	nobody := failure == errNobody
	if nobody {
		failure = s.whyNobody(ctx, x, service, instance)
	}
	if x.sent && failure.Code == ErrCanceled.Code && !answered {
		s.notify(cancelSubject(service), []byte(x.reply))
	}
	unreached := failure.NotRun && slices.Contains(passing, failure.Code)
	missing := !answered && isMissing(failure)
	switch {
	case failure.Code == ErrNotActive.Code:
		b.report(probe, neither)
	case unreached && (answered || nobody), missing && failure.Code == ErrTimeout.Code:
		b.report(probe, bad)
	case answered || nobody:
		b.report(probe, good)
	default: // it says nothing about the service
		b.report(probe, neither)
	}
	return nil, failure, unreached || missing && cfg.idempotent
}

// address sends the call once, to a certain instance if its options say so.
func (s *Service) address(ctx context.Context, x *exchange, service string, cfg *callConfig) (answer *nats.Msg, instance string, failure *Error) {
	instance = cfg.instance
	if instance == "" && cfg.sticky {
		instance = s.leaderOf(ctx, service)
	}
	switch {
	case instance != "":
		to := *x
		to.subject += "." + instance
		answer, failure = s.request(ctx, &to)
		x.reply, x.sent = to.reply, to.sent
		if failure == errNobody && cfg.instance == "" { // it was the leader; there may be another, or none any more
			answer, failure = s.request(ctx, x)
			instance = ""
		}
	case cfg.balanced:
		answer, failure = s.requestAny(ctx, x, service, cfg.strategy)
	default:
		answer, failure = s.request(ctx, x)
	}
	return answer, instance, failure
}

// A BreakerPolicy says when calls to a service are refused without a try: after so many Failures in a row, for Cooldown; then
// one call probes, and decides whether the rest may follow. A failure is a call that no handler answered: no instance, no
// answer in time, overloaded, stopping. What a handler returns is an answer; NOT_ACTIVE, a caller's own cancel and a lost
// connection say nothing. Fields that are 0 have their defaults; negative ones are invalid.
type BreakerPolicy struct {
	Failures int           // default 5
	Cooldown time.Duration // default 5 s
}

type breaker struct {
	policy BreakerPolicy

	mu       sync.Mutex // guards the rest
	failures int        // in a row
	until    time.Time  // the end of the cooldown; zero while closed
	probing  bool
}

type verdict int

const (
	neither verdict = iota
	good
	bad
)

// breaker is the one before a service; nil, which lets all through, without WithBreaker.
func (s *Service) breaker(service string) *breaker {
	if s.cfg.breaker.Failures == 0 {
		return nil
	}
	return s.breakers.get(service, func() *breaker { return &breaker{policy: s.cfg.breaker} })
}

const closed, open = "closed", "open"

func (b *breaker) state() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.until.IsZero():
		return closed
	case time.Until(b.until) > 0:
		return open
	}
	return "half-open"
}

// admit tells whether a call may go out, as a probe perhaps, or how long it has to wait.
func (b *breaker) admit() (probe bool, wait time.Duration) {
	if b == nil {
		return false, 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.until.IsZero() {
		return false, 0
	}
	if wait := time.Until(b.until); wait > 0 {
		return false, wait
	}
	if b.probing {
		return false, b.policy.Cooldown
	}
	b.probing = true
	return true, 0
}

func (b *breaker) report(probe bool, v verdict) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if probe {
		b.probing = false
	} else if !b.until.IsZero() {
		return // sent before it opened
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
