package aegis

// This file is typed RPC: a handler's side (Handle), a caller's side (Call), and what lies between them on the wire: reply
// subjects that carry the deadline, typed errors, retries and the circuit breaker.

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"math"
	mrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// An Error is what fails in aegis, here or in a service that was called.
//
// Code is in upper snake case: one of the sentinels', or a handler's own. Source is the service that reports the error, ""
// for this one. NotRun says that the request certainly did not reach a handler, so that sending it again can do no harm.
// Cause is the error of the service behind Source, and so on over all hops.
//
// [errors.Is] compares the codes, along the whole chain: errors.Is(err, aegis.ErrNotFound) holds on both sides of the wire.
// An error with the code DEADLINE_EXCEEDED also is [context.DeadlineExceeded], one with CANCELED [context.Canceled].
type Error struct {
	Code    string            `json:"code"`
	Message string            `json:"message,omitempty"`
	Source  string            `json:"source,omitempty"`
	Details map[string]string `json:"details,omitempty"`
	NotRun  bool              `json:"not_run,omitempty"`
	Cause   *Error            `json:"cause,omitempty"`
}

// The errors that aegis itself makes, to be compared with [errors.Is].
var (
	ErrInvalid       = &Error{Code: "INVALID_ARGUMENT"}  // a name, option or payload that can't be used
	ErrNotFound      = &Error{Code: "NOT_FOUND"}         // there is no such thing
	ErrNotActive     = &Error{Code: "NOT_ACTIVE"}        // another instance leads
	ErrFenced        = &Error{Code: "FENCED"}            // leadership was lost while the handler ran
	ErrUnavailable   = &Error{Code: "UNAVAILABLE"}       // no instance or no server can be reached
	ErrTimeout       = &Error{Code: "DEADLINE_EXCEEDED"} // no answer in time
	ErrOverloaded    = &Error{Code: "OVERLOADED"}        // the handler is at its limit
	ErrUnimplemented = &Error{Code: "UNIMPLEMENTED"}     // the service has no such method
	ErrInternal      = &Error{Code: "INTERNAL"}          // a handler's plain error, or its panic
	ErrCircuitOpen   = &Error{Code: "CIRCUIT_OPEN"}      // the service failed too often just now
	ErrCanceled      = &Error{Code: "CANCELED"}          // ctx was cancelled
	ErrClosed        = &Error{Code: "CLOSED"}            // the service was stopped
	ErrDenied        = &Error{Code: "PERMISSION_DENIED"} // the server's permissions don't allow it
)

// Error is the path over the services that the error came along, with the code and the message of each that added one.
func (e *Error) Error() string {
	var parts []string
	for ; e != nil; e = e.Cause {
		parts = append(parts, e.Source)
		if c := e.Cause; c == nil || c.Code != e.Code || c.Message != e.Message {
			parts = append(parts, e.Code, e.Message)
		}
	}
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), ": ")
}

// Is compares the code.
func (e *Error) Is(target error) bool {
	switch target {
	case context.DeadlineExceeded:
		return e.Code == ErrTimeout.Code
	case context.Canceled:
		return e.Code == ErrCanceled.Code
	}
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// cut is e without what makes it too large to be stored.
func (e *Error) cut() *Error {
	out := *e
	out.Message = out.Message[:min(len(out.Message), maxErrorText)]
	if data, err := MsgPack.Marshal(&out); err == nil && len(data) > letterRoom {
		out.Details, out.Cause = nil, nil
	}
	return &out
}

// Unwrap is the cause.
func (e *Error) Unwrap() error { return e.Cause.orNil() }

// orNil is e as an error, which is nil if e is.
func (e *Error) orNil() error {
	if e == nil {
		return nil
	}
	return e
}

func newError(kind *Error, format string, args ...any) *Error {
	return &Error{Code: kind.Code, Message: fmt.Sprintf(format, args...)}
}

func notRun(e *Error) *Error {
	e.NotRun = true
	return e
}

// asError is the error that a handler's caller gets to see for err, nil for nil.
func asError(err error) *Error {
	e, ok := errors.AsType[*Error](err)
	switch {
	case err == nil:
		return nil
	case ok && e == nil:
		return newError(ErrInternal, "the handler returned a nil *aegis.Error as an error: return nil itself")
	case !ok && errors.Is(err, context.DeadlineExceeded):
		return newError(ErrTimeout, "%v", err)
	case !ok && errors.Is(err, context.Canceled):
		return newError(ErrCanceled, "%v", err)
	case !ok:
		return newError(ErrInternal, "%v", err)
	}
	out := *e
	own := e.Message
	if e.Source != "" { // it came from a service that the handler called
		out.Cause, own = e, ""
	}
	if error(e) != err { // keep the words that it was wrapped in
		out.Message = strings.TrimSuffix(strings.Replace(err.Error(), e.Error(), own, 1), ": ")
	}
	return &out
}

// The wire.

const (
	headerContentType = "Content-Type"
	headerErrorCode   = "Nats-Service-Error-Code" // numeric, as HTTP has them
	headerErrorText   = "Nats-Service-Error"
	headerCorrelation = "Aegis-Correlation-Id"
	headerTraceParent = "traceparent" // https://www.w3.org/TR/trace-context/
	headerTraceState  = "tracestate"
)

// statusCodes give the error codes a number for callers that only know micro's headers, and back.
var statusCodes = []struct {
	kind   *Error
	status string
}{
	{ErrInvalid, "400"}, {ErrDenied, "403"}, {ErrNotFound, "404"}, {ErrFenced, "409"}, {ErrNotActive, "421"}, {ErrOverloaded, "429"}, {ErrCanceled, "499"},
	{ErrInternal, "500"}, {ErrUnimplemented, "501"}, {ErrUnavailable, "503"}, {ErrTimeout, "504"}, {ErrCircuitOpen, "503"}, {ErrClosed, "503"},
}

const handlerStatus = "422" // of a code that is the handler's own

// encode puts the error into headers, for any NATS client, and into a payload, whole.
func (e *Error) encode(c Codec) (nats.Header, []byte) {
	status := handlerStatus
	for _, s := range statusCodes {
		if s.kind.Code == e.Code {
			status = s.status
			break
		}
	}
	if c != JSON {
		c = MsgPack
	}
	data, _ := c.Marshal(e) // strings and booleans only: it can't fail
	text := e.Error()
	return nats.Header{headerErrorCode: {status}, headerErrorText: {text[:min(len(text), maxErrorText)]}}, data
}

const maxErrorText = 1 << 10

// decodeError is the error that an answer stands for, nil if it is a success.
func decodeError(m *nats.Msg) *Error {
	status := m.Header.Get(headerErrorCode)
	if status == "" {
		return nil
	}
	e := &Error{}
	if c := sniff(m.Data); c != nil && c.Unmarshal(m.Data, e) == nil && e.Code != "" {
		return e
	}
	return newError(kindOf(status), "%s", m.Header.Get(headerErrorText)) // of a service that isn't aegis
}

// kindOf is the error that a status means.
func kindOf(status string) *Error {
	for _, s := range statusCodes {
		if s.status == status {
			return s.kind
		}
	}
	return ErrInternal
}

// An address is what a reply subject says about its caller:
//
//	<inbox prefix>.<calling service>.<connection>.<slot>.<call>[-<correlation id>].<budget in ms>
//
// so that deadline, caller and correlation id need no header. It is the caller's own account, and proves nothing.
type address struct {
	service string
	call    string        // <connection>.<slot>.<call>[-<correlation id>]
	budget  time.Duration // 0 for a caller that isn't aegis: all is unknown then
}

const connectionToken = 12 // characters: 60 random bits

func parseAddress(reply string) (a address) {
	last := max(strings.LastIndexByte(reply, '.'), 0)
	ms, err := strconv.ParseUint(strings.TrimPrefix(reply[last:], "."), 10, 40)
	if err != nil || ms == 0 || last == 0 {
		return a
	}
	first := last
	for range 3 {
		first = strings.LastIndexByte(reply[:max(first, 0)], '.')
	}
	service := reply[:max(first, 0)]
	service = service[strings.LastIndexByte(service, '.')+1:]
	call := reply[first+1 : last]
	if len(call) <= connectionToken || call[connectionToken] != '.' || !isName(service, maxService) {
		return a
	}
	return address{service, call, time.Duration(ms) * time.Millisecond}
}

func (a address) correlationID() string {
	if _, id, ok := strings.Cut(a.call, "-"); ok {
		return id
	}
	return strings.ReplaceAll(a.call, ".", "-")
}

// isToken tells whether s is one token of a subject, of letters, digits, - and _.
func isToken(s string, most int) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return len(s) > 0 && len(s) <= most
}

func isName(s string, most int) bool {
	return isToken(s, most) && (s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z')
}

// A handler's side.

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

// checkNames checks the names of a service and of its method or command.
func checkNames(service, what, name string) *Error {
	switch {
	case !isName(service, maxService):
		return notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d", service, maxService))
	case !isName(name, 128), strings.Contains(name, "-"):
		return notRun(newError(ErrInvalid, "%s %q: want a letter, then letters, digits and _", what, name))
	}
	return nil
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

// A caller's side.

// A CallOption configures one call.
type CallOption func(*callConfig)

type callConfig struct {
	kind               string // of message
	sticky, idempotent bool
	balanced           bool
	strategy           Strategy
	retry              *RetryPolicy
	instance           string
	version, key       string
	priority           Priority
	err                *Error // of the first option that can't be used
}

func (c *callConfig) check(ok bool, format string, args ...any) {
	if !ok && c.err == nil {
		c.err = notRun(newError(ErrInvalid, format, args...))
	}
}

// callConfigs are those without any option: an event has an id, so that it may be sent again.
var callConfigs = map[string]*callConfig{
	kindRPC:     {kind: kindRPC},
	kindEvent:   {kind: kindEvent, idempotent: true},
	kindCommand: {kind: kindCommand, idempotent: true},
}

func newCallConfig(kind string, opts []CallOption) *callConfig {
	plain := callConfigs[kind]
	if len(opts) == 0 {
		return plain
	}
	cfg := *plain
	for _, opt := range opts {
		opt(&cfg)
	}
	return &cfg
}

// A RetryPolicy says how often and when a call is sent again. The pause before attempt n+1 is random between 0 and
// Backoff·2ⁿ⁻¹, at most MaxBackoff ("full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
// Fields that are 0 have their defaults; negative ones are invalid.
type RetryPolicy struct {
	Attempts       int           // in all; default 3
	Backoff        time.Duration // default 50 ms
	MaxBackoff     time.Duration // default 1 s
	AttemptTimeout time.Duration // of one attempt of an Idempotent call; default 1 s
}

// Retry sends the call again when it certainly did not reach a handler (NotRun) because its service was unavailable,
// overloaded, without an active instance, or behind an open circuit breaker.
func Retry(p RetryPolicy) CallOption {
	return func(c *callConfig) {
		c.check(p.Attempts >= 0 && p.Backoff >= 0 && p.MaxBackoff >= 0 && p.AttemptTimeout >= 0, "Retry(%+v): negative", p)
		c.retry = &p
	}
}

// Sticky follows the instance that leads a service with [Exclusive] handlers: it addresses that one directly. It keeps at a call that
// did not reach a handler, as [Retry] does, but until ctx ends: through a failover or a restart of the service, say. Its pauses are
// of 10 ms at first and at most 200 ms, unless Retry sets others. Only a call that may have run fails, when its leader dies, unless
// it is [Idempotent] too.
func Sticky() CallOption { return func(c *callConfig) { c.sticky = true } }

// Idempotent is the caller's word that it does no harm if the handler runs twice. The call is then also sent again when an
// answer is missing: after AttemptTimeout, or when the connection is lost. Without [Retry] or [Sticky], Retry's defaults hold.
func Idempotent() CallOption { return func(c *callConfig) { c.idempotent = true } }

// ToInstance addresses the instance with this id.
func ToInstance(id string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindRPC, "ToInstance(%q): only calls are addressed to an instance", id)
		c.check(isToken(id, maxInstance), "ToInstance(%q): want 1 to %d of a-z, A-Z, 0-9, - and _", id, maxInstance)
		c.instance = id
	}
}

// policy fills in the defaults.
func (c *callConfig) policy() RetryPolicy {
	p := RetryPolicy{Attempts: 1}
	switch {
	case c.retry != nil:
		p = *c.retry
	case c.sticky:
		p = RetryPolicy{Backoff: 10 * time.Millisecond, MaxBackoff: 200 * time.Millisecond}
	case c.idempotent:
		p = RetryPolicy{}
	}
	p.Attempts = cmp.Or(p.Attempts, 3)
	if c.sticky {
		p.Attempts = math.MaxInt
	}
	p.Backoff = cmp.Or(p.Backoff, 50*time.Millisecond)
	p.MaxBackoff = cmp.Or(p.MaxBackoff, time.Second)
	p.AttemptTimeout = cmp.Or(p.AttemptTimeout, time.Second)
	return p
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

// persist makes attempts, within the time that ctx gives, until one succeeds or may not be followed by another. It releases buf,
// which holds x.data, if no attempt can still wait to be published.
func (s *Service) persist(ctx context.Context, x *exchange, cfg *callConfig, buf *packer, attempt func() (answer *nats.Msg, failure *Error, again bool)) (*nats.Msg, *Error) {
	policy := cfg.policy()
	end := clock() + timeLeft(ctx, s.cfg.timeout)
	mayHaveRun := false
	var last *Error
	for n := 1; ; n++ {
		x.until = end
		if cfg.idempotent {
			now := clock()
			x.until = now + min(end-now, policy.AttemptTimeout)
		}
		answer, failure, again := attempt()
		if failure == nil {
			if n == 1 {
				buf.release()
			}
			return answer, nil
		}
		mayHaveRun = mayHaveRun || !failure.NotRun
		failure.NotRun = !mayHaveRun
		if !again || n >= policy.Attempts {
			if failure.Source == "" && (failure.Code == ErrTimeout.Code || failure.Code == ErrCanceled.Code) {
				failure.Cause = last // tells more than that the time was up
			}
			return nil, failure
		}
		if last == nil || !failure.NotRun || ctx.Err() == nil && clock() < end { // else the end cut it short, so it tells less than the one before
			last = failure
		}
		sleep(ctx, min(backoff(n, policy.Backoff, policy.MaxBackoff), end-clock()))
		if err := ctx.Err(); err != nil || clock() >= end {
			given := newError(ErrTimeout, "gave up on %s after %d attempts", x.subject, n)
			if errors.Is(err, context.Canceled) {
				given.Code = ErrCanceled.Code
			}
			given.NotRun, given.Cause = failure.NotRun, last
			return nil, given
		}
	}
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

// passing are the codes of what may have passed by itself in a moment.
var passing = []string{ErrUnavailable.Code, ErrOverloaded.Code, ErrNotActive.Code, ErrCircuitOpen.Code}

// isMissing tells that a message was sent but not answered.
func isMissing(failure *Error) bool {
	return !failure.NotRun && (failure.Code == ErrUnavailable.Code || failure.Code == ErrTimeout.Code)
}

// mayPass tells that what may be sent again could succeed then.
func mayPass(failure *Error) bool {
	return failure != nil && (isMissing(failure) || failure.NotRun && slices.Contains(passing, failure.Code))
}

// Request: a message out, the one answer back.

// An exchange is what request sends, and the reply subject that it was given.
type exchange struct {
	subject     string
	header      nats.Header
	data        []byte
	correlation string        // "" for one of its own
	until       time.Duration // by the clock; what is left then is told to the handler
	on          *conn         // to send it on; nil for any that is up
	reply       string
	sent        bool
}

// within gives x the time that ctx has, most at the most.
func (x *exchange) within(ctx context.Context, most time.Duration) *exchange {
	x.until = clock() + min(timeLeft(ctx, most), most)
	return x
}

// timeLeft is what ctx gives, or if it has no deadline, usual.
func timeLeft(ctx context.Context, usual time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		usual = time.Until(deadline)
	}
	return min(usual, maxBudget)
}

const maxBudget = 365 * 24 * time.Hour // a deadline farther away has no room in a reply subject, or on the clock

// errNobody is request's answer if no one listens on the subject.
var errNobody = notRun(newError(ErrUnavailable, "nobody listens"))

// A slot waits for the answer to one call at a time. It is a subscription that is kept and used again, to
// <inbox>.<slot>.>, so that the connection's read loop hands an answer straight to its caller; the call's number in the reply
// subject tells it from a late one to an earlier call. A nil among the answers tells the caller to look whether its time is up
// or its connection was lost.
type slot struct {
	sub     *nats.Subscription
	prefix  string
	answers chan *nats.Msg
	alarm   *time.Timer // wakes the call whose time is up
	missed  int         // calls that were given up; their answers may still come, and fill answers
	calls   uint64

	// Of the present call:
	since, until time.Duration
	drops        uint32 // of the connection, when it began
}

// clock is monotonic time.
func clock() time.Duration { return time.Since(clockStart) }

var clockStart = time.Now()

// await has the slot woken at that time.
func (sl *slot) await(until time.Duration) {
	sl.until = until
	sl.alarm.Reset(until - clock())
}

// wake has the one who reads the answers look why.
func (sl *slot) wake() {
	select {
	case sl.answers <- nil:
	default: // then there is something to wake it already
	}
}

func (c *conn) wakeSlots() {
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	for sl := range c.slots {
		sl.wake()
	}
}

// slot takes the free slot that was used last, or makes one.
func (c *conn) slot() (*slot, *Error) {
	c.slotsMu.Lock()
	n := len(c.free)
	if n == 0 {
		c.slotsMu.Unlock()
		return c.newSlot(c.newInbox()+".", 4*maxMissed)
	}
	sl := c.free[n-1]
	c.free = c.free[:n-1]
	c.slotsMu.Unlock()
	for len(sl.answers) > 0 { // late ones
		<-sl.answers
	}
	return sl, nil
}

// newSlot makes a slot for what comes under prefix, with room for so many messages.
func (c *conn) newSlot(prefix string, room int) (*slot, *Error) {
	sl := &slot{prefix: prefix, calls: mrand.Uint64N(1 << 32), answers: make(chan *nats.Msg, room)}
	sl.alarm = time.AfterFunc(time.Hour, sl.wake)
	c.slotsMu.Lock()
	full := len(c.slots) >= maxSlots
	if !full {
		c.slots[sl] = true
	}
	c.slotsMu.Unlock()
	if full {
		return nil, notRun(newError(ErrOverloaded, "%d calls wait for their answers: try later, or use WithPool for more connections", maxSlots))
	}
	subject := prefix
	if strings.HasSuffix(prefix, ".") {
		subject += ">"
	}
	var err error
	if sl.sub, err = c.nc.ChanSubscribe(subject, sl.answers); err != nil { // the connection is closed
		c.endSlot(sl)
		return nil, errDropped
	}
	return sl, nil
}

// newInbox is a subject for answers that no one else uses.
func (c *conn) newInbox() string { return c.inbox + strconv.FormatUint(c.inboxes.Add(1), 10) }

const maxMissed = 8

// release puts a slot back, or ends it if many late answers to it may be on their way.
func (c *conn) release(sl *slot, answered bool) {
	sl.alarm.Stop()
	if !answered {
		sl.missed++
	}
	if sl.missed == maxMissed {
		c.endSlot(sl)
		return
	}
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	c.free = append(c.free, sl)
}

func (c *conn) endSlot(sl *slot) {
	sl.alarm.Stop()
	_ = sl.sub.Unsubscribe() // fails only on a closed connection
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	delete(c.slots, sl)
}

// request publishes x and waits for its answer, until x.until at most. Whatever goes wrong becomes an Error here.
func (s *Service) request(ctx context.Context, x *exchange) (*nats.Msg, *Error) {
	if err := ctx.Err(); err != nil {
		return nil, notRun(asError(err))
	}
	begin := clock()
	if x.until <= begin {
		return nil, notRun(newError(ErrTimeout, "no time left for %s", x.subject))
	}
	x.sent = false
	for range s.conns {
		c := x.on
		if c == nil {
			if c = s.pick(); c == nil {
				break
			}
		}
		var answer *nats.Msg
		sl, failure := c.slot()
		if failure == nil {
			sl.since = begin
			answer, failure = s.exchange(ctx, c, sl, x)
			c.release(sl, failure == nil)
		}
		switch {
		case failure != errDropped:
			return answer, failure
		case x.on != nil:
			return nil, notRun(newError(ErrUnavailable, "the connection was lost"))
		}
	}
	return nil, s.disconnectedError()
}

// errDropped says that the connection was lost before anything was written.
var errDropped = &Error{}

func (s *Service) exchange(ctx context.Context, c *conn, sl *slot, x *exchange) (*nats.Msg, *Error) {
	sl.calls += 1 + mrand.Uint64N(1<<20) // no one can tell the next from the last
	var buf [256]byte
	b := append(buf[:0], sl.prefix...)
	b = strconv.AppendUint(b, sl.calls, 36)
	if x.correlation != "" {
		b = append(append(b, '-'), x.correlation...)
	}
	b = strconv.AppendInt(append(b, '.'), max((x.until-clock()).Milliseconds(), 1), 10)
	x.reply = string(b)
	sl.drops = c.drops.Load()
	if !c.up.Load() {
		return nil, errDropped
	}
	sl.await(x.until)

	switch err := c.publish(outgoing{x.subject, x.reply, x.header, x.data, x.until, sl.drops}); {
	case err == nil:
		x.sent = true
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return nil, errDropped
	case errors.Is(err, nats.ErrMaxPayload):
		return nil, notRun(newError(ErrInvalid, "the request to %s has %d bytes, more than the server's max_payload of %d", x.subject, len(x.data), c.nc.MaxPayload()))
	case errors.Is(err, nats.ErrBadHeaderMsg):
		return nil, notRun(newError(ErrInvalid, "the request to %s has a header whose key is no HTTP token: %q", x.subject, slices.Collect(maps.Keys(x.header))))
	case errors.Is(err, nats.ErrConnectionClosed):
		return nil, s.disconnectedError()
	default: // part of it may have been written
		return nil, newError(ErrUnavailable, "publishing to %s: %v", x.subject, err)
	}

	for {
		var m *nats.Msg
		select {
		case m = <-sl.answers:
		case <-ctx.Done():
			return nil, unanswered(asError(ctx.Err()), sl, x)
		}
		if m != nil && m.Subject == x.reply {
			if isNobody(m) {
				return nil, errNobody
			}
			return m, nil
		}
		if failure := s.over(c, sl, x.subject); failure != nil {
			return nil, unanswered(failure, sl, x)
		}
	}
}

// isNobody tells whether m is the server's answer to a message on whose subject no one listens.
func isNobody(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }

// over tells why no answer to what was sent to subject will come to a slot that was woken, nil if one may.
func (s *Service) over(c *conn, sl *slot, subject string) *Error {
	denied := s.denied.since(sl.since, toPublish+subject)
	if denied == nil {
		if denied = s.denied.since(sl.since, toSubscribe+sl.sub.Subject); denied != nil {
			denied.NotRun = false
			sl.missed = maxMissed - 1 // it hears nothing
		}
	}
	switch {
	case denied != nil:
		return denied
	case s.base.Err() != nil:
		return s.closedError()
	case c.drops.Load() != sl.drops:
		return newError(ErrUnavailable, "the connection was lost")
	case clock() >= sl.until:
		return newError(ErrTimeout, "%v", context.DeadlineExceeded)
	}
	return nil
}

// unanswered adds to the error of a call that may have run what it takes to find it in the logs of both sides.
func unanswered(e *Error, sl *slot, x *exchange) *Error {
	if e.Code == ErrDenied.Code {
		return e
	}
	e.Message = fmt.Sprintf("no answer from %s within %v: %s", x.subject, (x.until - sl.since).Round(time.Millisecond), e.Message)
	e.Details = map[string]string{"correlation_id": parseAddress(x.reply).correlationID()}
	return e
}

// Cancellation: when a caller's ctx is cancelled, all instances of the service are told the call's reply subject, and the one
// that works on it ends its handler's ctx. It is best effort: the deadline bounds a handler in any case.

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

// Circuit breaker.

// A BreakerPolicy says when calls to a service are refused without a try: after so many Failures in a row, for Cooldown; then
// one call probes, and decides whether the rest may follow. A failure is a call that no handler answered: no instance, no
// answer in time, overloaded, stopping. What a handler returns is an answer; NOT_ACTIVE, a caller's own cancel and a lost
// connection say nothing. Fields that are 0 have their defaults; negative ones are invalid.
type BreakerPolicy struct {
	Failures int           // default 5
	Cooldown time.Duration // default 5 s
}

// breaker is the one before a service; nil, which lets all through, without WithBreaker.
func (s *Service) breaker(service string) *breaker {
	if s.cfg.breaker.Failures == 0 {
		return nil
	}
	return s.breakers.get(service, func() *breaker { return &breaker{policy: s.cfg.breaker} })
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
