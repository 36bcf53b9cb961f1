package aegis

import (
	"cmp"
	"context"
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has what a handler knows about its message: the ctx, the headers, the caller, and the correlation id; and how a
// caller cancels its call.

// A request is the ctx of a handler, and all that is known about its message. The ctx with the deadline needs a timer and an
// entry in cancels, so it is made only when the handler first uses it; see live.
type request struct {
	context.Context // the service's own, or an exclusive handler's term
	svc             *Service
	msg             Message
	in              *nats.Msg // the message as it arrived
	reply           string    // the reply subject; "" if no answer is expected, as for an event or a command
	from            address   // what reply says about the caller
	id              string    // of a stored message or a request without a reply subject: the correlation id if no header has one
	deadline        time.Time
	codec           Codec       // of the payload, then of the answer; nil until the payload is decoded
	permanent       bool        // whether another attempt would end with the same error
	retryAfter      *retryError // from RetryAfter, else nil
	ran             bool        // whether the handler was called
	delivery        *delivery   // nil for an RPC request
	run             *commandRun // of a command, else nil
	term            *term       // the term in which an exclusive handler was called, else nil
	fenced          bool        // whether the term was over when the handler returned

	mu     sync.Mutex      // guards timed and cancel
	timed  context.Context // the ctx with the deadline, nil until it is made; see live
	cancel context.CancelFunc
}

type requestKey struct{}

// Value asks timed if that was made, so that package context recognizes it as the parent of a ctx that is derived from r, and
// needs no goroutine for that.
func (r *request) Value(key any) any {
	if key == (requestKey{}) {
		return r
	}
	r.mu.Lock()
	timed := r.timed
	r.mu.Unlock()
	if timed == nil || timed == endedContext { // endedContext has no values
		timed = r.Context
	}
	return timed.Value(key)
}

func (r *request) Deadline() (time.Time, bool) { return r.deadline, true }
func (r *request) Done() <-chan struct{}       { return r.live().Done() }
func (r *request) Err() error                  { return r.live().Err() }

// live returns the ctx that ends with the deadline, when the handler returns, when the caller cancels, or when r.Context ends.
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

// endedContext is the ctx of every handler that has returned without using its ctx.
var endedContext, endContext = context.WithCancel(context.Background())

func init() { endContext() }

// abort ends the ctx while the handler is running.
func (r *request) abort() {
	r.live()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cancel()
}

// end ends the ctx because the handler has returned.
func (r *request) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timed == nil {
		r.timed, r.cancel = endedContext, endContext
		return
	}
	r.svc.cancels.remove(r.reply)
	r.cancel()
}

// termOver reports whether the handler is exclusive and its term is over.
func (r *request) termOver() bool { return r.term != nil && !r.term.holds() }

// requestOf returns the request that ctx is, or is derived from. It is noRequest if ctx does not come from a handler.
func requestOf(ctx context.Context) *request {
	r, _ := ctx.Value(requestKey{}).(*request)
	return cmp.Or(r, noRequest)
}

var noRequest = &request{} // has no message, so no headers and no correlation id; compared by identity, and never changed

// The headers of messages.
const (
	headerContentType = "Content-Type"
	headerSource      = "Aegis-Source" // the service that sent it
	headerCorrelation = "Aegis-Correlation-Id"
	headerTraceParent = "traceparent" // https://www.w3.org/TR/trace-context/
	headerTraceState  = "tracestate"

	headerTimeout   = "Aegis-Timeout"           // of a call: the time that it has left, as a Go duration or in milliseconds
	headerErrorCode = "Nats-Service-Error-Code" // of an answer that is an error: its status, which is a number, as in HTTP
	headerErrorText = "Nats-Service-Error"      // the same: its text

	headerVersion = "Aegis-Version" // of an event: what EventVersion has set
	headerDigest  = "Aegis-Digest"  // of a command: the digest of its data

	headerID      = "Aegis-Id"      // of a command, and of a message that is stored again: the id
	headerSubject = "Aegis-Subject" // of a message that is stored again: the original subject
	headerTime    = "Aegis-Time"    // the same: when it was first stored, in RFC 3339
	headerAttempt = "Aegis-Attempt" // of an event that RetryAfter has stored again: the attempt that its first delivery is

	headerConsumer = "Aegis-Consumer" // of a dead letter: where it comes from
	headerReason   = "Aegis-Reason"   // the same: the text of the last error
	headerAttempts = "Aegis-Attempts" // the same: how often it was delivered

	headerSchedule = "Aegis-Schedule" // of a recurring schedule, and of what it sends: its name
	headerSpec     = "Aegis-Spec"     // of a recurring schedule: its spec, as it was given
)

// CorrelationID returns the correlation id of the message to whose handler ctx belongs, for use in logs. The id is the same in
// each service through which a request passes. The ctx of a handler always has one. Any other ctx has the id that [WithHeader]
// has set as Aegis-Correlation-Id, or "" if there is none. If a call got no answer, Details["correlation_id"] of its error has
// the id of the call, even if ctx had none.
func CorrelationID(ctx context.Context) string {
	return cmp.Or(addedHeaders(ctx).Get(headerCorrelation), requestOf(ctx).correlationID())
}

// correlationID returns the id from the header or from the reply subject. If neither has one, it returns r.id or, for a caller
// that does not use aegis, the reply subject.
func (r *request) correlationID() string {
	return cmp.Or(r.msg.Header.Get(headerCorrelation), r.from.correlationID(), r.id+r.reply)
}

// Headers returns the headers of the message to whose handler ctx belongs, or nil if there are none. They must not be changed.
func Headers(ctx context.Context) nats.Header { return requestOf(ctx).msg.Header }

type headersKey struct{}

// WithHeader returns a copy of ctx with a header that is added to everything that is sent with this ctx. Another WithHeader with
// the same key replaces the value. A handler's ctx passes on only the trace context (traceparent, tracestate) and the correlation
// id of the message; use WithHeader to pass on other headers. If key is not an HTTP token, what is sent with this ctx fails with
// [ErrInvalid]. Spaces at the ends of value are removed.
func WithHeader(ctx context.Context, key, value string) context.Context {
	return context.WithValue(ctx, headersKey{}, withHeader(addedHeaders(ctx), key, value))
}

// withHeader returns a copy of h with one header set.
func withHeader(h nats.Header, key, value string) nats.Header {
	out := make(nats.Header, len(h)+1)
	maps.Copy(out, h)
	out[key] = []string{value}
	return out
}

// addedHeaders returns the headers that WithHeader has added to ctx.
func addedHeaders(ctx context.Context) nats.Header {
	h, _ := ctx.Value(headersKey{}).(nats.Header)
	return h
}

// headersFor returns the headers to send with ctx: those of WithHeader, and those that are passed on from the message being
// handled. A correlation id that can travel in the reply subject is returned as correlation instead.
func headersFor(ctx context.Context) (h nats.Header, correlation string) {
	h = addedHeaders(ctx)
	r := requestOf(ctx)
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

// An address is what a reply subject says about the caller:
//
//	<inbox prefix>.<calling service>.<connection>.<slot>.<call>[-<correlation id>].<budget in ms>
//
// so that the deadline, the caller and the correlation id need no header. All this is what the sender claims; it is not
// authenticated.
type address struct {
	service string
	call    string        // <connection>.<slot>.<call>[-<correlation id>]
	budget  time.Duration // 0 for a caller that does not use aegis; then the rest is unknown too
}

// callerOf returns what a request says about its caller: in its reply subject or, if the server has replaced that on the way to
// this account, or the caller does not use aegis, in headers.
func callerOf(m *nats.Msg) (address, *Error) {
	from := parseAddress(m.Reply)
	if m.Header == nil {
		return from, nil
	}
	if name := m.Header.Get(headerSource); from.service == "" && isName(name, maxService) {
		from.service = name
	}
	text := m.Header.Get(headerTimeout)
	if text == "" {
		return from, nil
	}
	budget, err := time.ParseDuration(text)
	if ms, failure := strconv.ParseUint(text, 10, 40); failure == nil {
		budget, err = time.Duration(ms)*time.Millisecond, nil
	}
	if err != nil || budget <= 0 {
		return from, notRun(newError(ErrInvalid, "%s: %.40q: want a duration such as 1.5s, or milliseconds, more than 0",
			headerTimeout, text))
	}
	from.budget = min(cmp.Or(from.budget, budget), budget, maxBudget)
	return from, nil
}

const connectionToken = 12 // characters of <connection>, which have 60 random bits

// parseAddress returns what a reply subject says, or the zero address if it is not in the form above.
func parseAddress(reply string) address {
	last := max(strings.LastIndexByte(reply, '.'), 0)
	ms, err := strconv.ParseUint(strings.TrimPrefix(reply[last:], "."), 10, 40)
	first := last
	for range 3 {
		first = strings.LastIndexByte(reply[:max(first, 0)], '.')
	}
	service := reply[:max(first, 0)]
	service = service[strings.LastIndexByte(service, '.')+1:]
	call := reply[first+1 : last]
	if err != nil || ms == 0 || len(call) <= connectionToken || call[connectionToken] != '.' || !isName(service, maxService) {
		return address{}
	}
	return address{service, call, time.Duration(ms) * time.Millisecond}
}

// correlationID returns the correlation id that the caller passed on. If there is none, it makes one from the call.
func (a address) correlationID() string {
	if _, id, ok := strings.Cut(a.call, "-"); ok {
		return id
	}
	return strings.ReplaceAll(a.call, ".", "-")
}

// Cancellation. When a caller's ctx is cancelled, it publishes the reply subject of its call to all instances of the service, and
// the instance that handles the call ends the handler's ctx. This is best effort; the deadline bounds a handler in any case.

func cancelSubject(service string) string { return "rpc." + service + ".$cancel" }

// cancels has the CancelFuncs of running handlers that use their ctx. It also remembers the latest cancellations that came
// before a handler here began, as keys with a nil CancelFunc.
type cancels struct {
	hadEarly atomic.Bool                   // whether a request was ever cancelled early
	mu       sync.Mutex                    // guards the rest
	funcs    map[string]context.CancelFunc // by the reply subject, or "commands." and the key of a command
	early    []string                      // the reply subjects of the requests that were cancelled early, oldest first
}

const maxEarly = 2048 // early cancellations that are remembered

// add makes cancel be called when the request with this reply subject is cancelled.
func (c *cancels) add(reply string, cancel context.CancelFunc) {
	c.mu.Lock()
	_, early := c.funcs[reply]
	c.funcs[reply] = cancel
	c.mu.Unlock()
	if early {
		cancel()
	}
}

func (c *cancels) remove(reply string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.funcs, reply)
}

// has reports whether the request was cancelled before it began.
func (c *cancels) has(reply string) bool {
	if !c.hadEarly.Load() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	cancel, known := c.funcs[reply]
	return known && cancel == nil
}

// receive handles a message on the cancel subject. Its payload is the reply subject of a call, or "commands." and a command's
// key.
func (c *cancels) receive(m *nats.Msg) {
	reply := string(m.Data)
	command := strings.HasPrefix(reply, commandPrefix)
	if len(reply) > 1024 || !command && parseAddress(reply).budget == 0 {
		return // not from a caller
	}
	c.mu.Lock()
	cancel, known := c.funcs[reply]
	if !known && !command {
		c.hadEarly.Store(true)
		c.funcs[reply] = nil
		if c.early = append(c.early, reply); len(c.early) > maxEarly {
			if oldest := c.early[0]; c.funcs[oldest] == nil {
				delete(c.funcs, oldest)
			}
			c.early = c.early[1:]
		}
	}
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}
