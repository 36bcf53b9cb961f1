package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has durable events: Publish and PublishBatch store them, and Subscribe handles them.
//
// An event goes through publish, through (the middleware), prepare (headers and size), withRetries and store, which waits until
// the stream has confirmed it. schedules.go adds what At, After and ExpireAfter need.
//
// On the other side, the feed (feed.go) brings the event to a worker, which calls serve. dispatch runs the handler and calls
// done, which acknowledges the event, has it redelivered after a pause, stores it again for later (RetryAfter), or stores it as
// a dead letter.

// An Event is an event as a handler of [Subscribe] gets it.
type Event[T any] struct {
	// ID is the key of IdempotencyKey, or random if there is none. It is the same each time that the event is sent or delivered.
	// The ID of an event from a publisher that does not use aegis is its Nats-Msg-Id or, if it has none, its Sequence.
	ID string
	// Domain and Type are the parts of the subject, events.<domain>.<type>. Type may have several tokens.
	Domain, Type string
	// Version is the version that EventVersion has set, or "".
	Version string
	// Source is the service that published the event. The sender claims it; it is not authenticated.
	Source string
	// Time is when the server first stored the event or, if it was published with At or After, when it became due. It is by the
	// server's clock.
	Time time.Time
	// Sequence is the event's number in the stream. It rises from event to event, with gaps. An event that was redriven, or
	// delayed by RetryAfter, has a new one.
	Sequence uint64
	// Attempt is the number of this delivery, from 1. It is more than 1 after an error, a crash, a lost acknowledgement, or a Stop
	// whose time was up while the handler ran.
	Attempt int
	// Data is the decoded payload.
	Data T
}

const (
	eventStream   = "AEGIS_EVENTS"
	eventPrefix   = "events."
	redrivePrefix = eventPrefix + "$redrive." // followed by the name of the consumer that the event is for, a dot, and a number

	maxEventToken = 128  // characters
	batchWindow   = 1024 // events of a batch that may wait for their confirmation; the server accepts up to 100,000
)

func (s *Service) eventStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: eventStream, Subjects: []string{eventPrefix + ">", eventSchedulePrefix + ">"}, Replicas: s.cfg.replicas,
		MaxAge: s.cfg.maxAge, MaxBytes: cmp.Or(s.cfg.maxBytes, -1),
	}
}

// Publish stores an event in the stream AEGIS_EVENTS, with the subject events.<domain>.<eventType>, and returns when the server
// has confirmed that. It makes the stream if there is none. domain is a letter, then letters, digits, - and _, at most 128
// characters. eventType is one or more such names, separated by dots. Publish blocks until ctx ends at most, or for [WithTimeout]
// if ctx has no deadline.
//
// Every event has an id, by which the server stores an event that is sent twice only once. Therefore Publish sends an event that
// was not confirmed again, as [Retry] does for an [Idempotent] call: by default in up to 3 attempts, and with [Sticky] until ctx
// ends.
//
// Errors:
//   - [ErrInvalid] if a name, an option or a header is invalid, if the event can't be encoded, if it is larger with its headers
//     than the server's max_payload less 2 KiB (so that it fits into a dead letter), or if the stream exists but can't do what an
//     option needs
//   - [ErrUnavailable] if there is no connection or no JetStream, or if the stream can't store the event at present, for example
//     because the stream or its account is full
//   - [ErrTimeout] or [ErrCanceled] if ctx ends, or [ErrTimeout] if no confirmation came in time
//   - [ErrOverloaded] if the connections carry too many calls ([WithPool]), or if the server's max_subscriptions is reached
//   - [ErrClosed] after Stop
//   - [ErrDenied] if the server's permissions do not allow it
//   - another sentinel, by the status of the server's answer, if the stream refuses the event for another reason
//
// If NotRun is not set in the error, the event may have been stored.
func Publish[T any](ctx context.Context, s *Service, domain, eventType string, data T, opts ...CallOption) error {
	p, failure := s.newPublication(domain, eventType, opts)
	if failure != nil {
		return failure
	}
	return p.publish(ctx, &data).orNil()
}

// A publication is what Publish stores, except for the payload. The events of a batch share one.
type publication struct {
	s       *Service
	cfg     *callConfig
	name    string // <domain>.<type>
	subject string
	header  nats.Header
	id      string    // of the event; in a batch, prepare adds the position
	due     time.Time // when to deliver it, the same for all events of a batch; zero for at once
	checked bool      // whether checkStream has found that the stream can do what the options want
}

func (s *Service) newPublication(domain, eventType string, opts []CallOption) (*publication, *Error) {
	cfg, failure := newCallConfig(kindEvent, opts)
	if failure != nil {
		return nil, failure
	}
	name := domain + "." + eventType
	malformed := func(token string) bool { return !isName(token, maxEventToken) }
	if strings.Contains(domain, ".") || slices.ContainsFunc(strings.Split(name, "."), malformed) {
		return nil, notRun(newError(ErrInvalid, "event %q: want domain.type, each of a letter, then letters, digits, - and _", name))
	}
	p := &publication{s: s, cfg: cfg, name: name, subject: eventPrefix + name, id: rand.Text()}
	if cfg.key != nil {
		p.id = name + ":" + *cfg.key // events of other types may have the same key
	}
	p.due = cfg.due()
	return p, nil
}

// publish stores one event, whose data value points to.
func (p *publication) publish(ctx context.Context, value any) *Error {
	out, failure := p.s.marshal(value, "the event "+p.name)
	if failure != nil {
		return failure
	}
	return p.s.through(ctx, kindPublish, p.subject, out, func(ctx context.Context, data []byte) *Error {
		p.setHeader(ctx)
		if failure := p.prepare(Raw{data, out.codec}, ""); failure != nil {
			return failure
		}
		return p.storeWithRetries(ctx, &exchange{subject: p.target(""), header: p.header, data: data})
	})
}

// storeWithRetries stores x, in as many attempts as the options allow.
func (p *publication) storeWithRetries(ctx context.Context, x *exchange) *Error {
	_, failure := p.s.withRetries(ctx, x, p.cfg, func() (*nats.Msg, *Error, bool) {
		failure := p.checkStream(ctx, x)
		if failure == nil {
			_, failure = p.s.store(ctx, x, p.s.eventStream())
		}
		return nil, failure, retryable(failure)
	})
	return failure
}

// setHeader sets the headers that come from ctx and from the options.
func (p *publication) setHeader(ctx context.Context) {
	p.header = p.s.newHeader(ctx)
	if p.cfg.version != nil {
		p.header[headerVersion] = []string{*p.cfg.version}
	}
}

// prepare sets the headers that differ from event to event, and checks the size. It adds suffix to the event's id.
func (p *publication) prepare(out Raw, suffix string) *Error {
	p.header[jetstream.MsgIDHeader] = []string{p.id + suffix}
	p.setTimes(suffix)
	return p.s.seal(p.header, out, "the event "+p.name)
}

// newHeader returns a message's headers from ctx, and the service's name as its source. The caller may add to them.
func (s *Service) newHeader(ctx context.Context) nats.Header {
	header, correlation := headersFor(ctx)
	header = withHeader(header, headerSource, s.name)
	if correlation != "" {
		header[headerCorrelation] = []string{correlation}
	}
	return header
}

// marshal encodes what value points to. The error calls the message what.
func (s *Service) marshal(value any, what string) (Raw, *Error) {
	out, err := marshal(s.cfg.codec, value)
	if err != nil {
		return out, notRun(newError(ErrInvalid, "encoding %s: %v", what, err))
	}
	return out, nil
}

// seal sets the content type of out in header if receivers can't detect it, and checks that the message is not too large. The
// error calls the message what.
func (s *Service) seal(header nats.Header, out Raw, what string) *Error {
	delete(header, headerContentType)
	if label := labelOf(out.codec); label != "" {
		header[headerContentType] = []string{label}
	}
	if size, limit := messageSize(header, out.data), s.maxPayload()-letterRoom; size > limit {
		return notRun(newError(ErrInvalid, "%s has %d bytes with its headers, more than %d: "+
			"the server's max_payload, less %d for what a dead letter adds", what, size, limit, letterRoom))
	}
	return nil
}

// PublishBatch publishes several events of one domain and type, in the order of data. It sends an event without waiting for the
// confirmation of the event before, and returns when every event was confirmed or has failed. It blocks until ctx ends at most.
// If ctx has no deadline, it gives up when no event was confirmed for [WithTimeout].
//
// The options and the further attempts are those of [Publish]. Events that are sent again are stored out of order.
//
// Errors:
//   - a single [*Error] if a name or an option is invalid, or from the middleware of [WithCallMiddleware]
//   - otherwise, one *Error of Publish for each event that failed, joined as by [errors.Join]; Details["index"] of each is the
//     index of the event in data, and the text has the first ten errors
func PublishBatch[T any](ctx context.Context, s *Service, domain, eventType string, data []T, opts ...CallOption) error {
	p, failure := s.newPublication(domain, eventType, opts)
	if failure != nil {
		return failure
	}
	p.cfg = new(*p.cfg)
	p.cfg.patience = s.cfg.timeout
	b := &batch{publication: p, failures: make([]*Error, len(data)), mayBeStored: make([]bool, len(data))}
	b.value = func(i int) any { return &data[i] }
	var all error
	var sent *Error
	failure = s.through(ctx, kindPublish, p.subject, Raw{}, func(ctx context.Context, _ []byte) *Error {
		all = b.publish(ctx)
		sent = asError(all)
		return sent
	})
	if failure != nil && failure == sent { // the middleware has passed the error on: return those of all events
		return all
	}
	return failure.orNil()
}

// A batch is several events that are published in order.
type batch struct {
	*publication
	value       func(i int) any // returns a pointer to the data of an event
	failures    []*Error        // by position
	mayBeStored []bool          // by position
}

// publish stores the first event as Publish does, because that makes the stream if need be and shows whether publishing works.
// Then it publishes all others in a pipeline. It repeats this with the events that failed and may be sent again.
func (b *batch) publish(ctx context.Context) error {
	b.setHeader(ctx)
	todo := make([]int, len(b.failures))
	for i := range todo {
		todo[i] = i
	}
	for len(todo) > 0 {
		first, rest := todo[0], todo[1:]
		payload, failure := b.encode(first)
		if failure == nil {
			x := &exchange{subject: b.target(suffix(first)), header: maps.Clone(b.header), data: payload}
			if failure = b.storeWithRetries(ctx, x); failure != nil {
				for _, i := range rest {
					b.setResult(i, notRun(newError(failure, "not sent, because event %d failed: %s", first, failure.Message)))
				}
				rest = nil
			}
		}
		b.setResult(first, failure)
		todo = b.pipeline(ctx, rest)
	}
	var errs []error
	for i, failure := range b.failures {
		if failure != nil {
			details := map[string]string{"index": strconv.Itoa(i)}
			maps.Copy(details, failure.Details) // the correlation id
			failure.Details = details
			failure.NotRun = !b.mayBeStored[i]
			errs = append(errs, failure)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return batchError(errs)
}

// A batchError has the errors of the events of a batch that failed. Its text has the first of them.
type batchError []error

const maxBatchErrors = 10

func (e batchError) Unwrap() []error { return e }

func (e batchError) Error() string {
	text := errors.Join(e[:min(len(e), maxBatchErrors)]...).Error()
	if more := len(e) - maxBatchErrors; more > 0 {
		text += fmt.Sprintf("\nand %d more", more)
	}
	return text
}

// encode encodes event i and sets the headers for it.
func (b *batch) encode(i int) ([]byte, *Error) {
	out, failure := b.s.marshal(b.value(i), "the event "+b.name)
	if failure != nil {
		return nil, failure
	}
	return out.data, b.prepare(out, suffix(i))
}

// suffix returns what the id of event i of a batch ends with.
func suffix(i int) string { return "-" + strconv.Itoa(i) }

// setResult stores the result of an attempt at event i.
func (b *batch) setResult(i int, failure *Error) {
	b.failures[i] = failure
	b.mayBeStored[i] = b.mayBeStored[i] || failure != nil && !failure.NotRun
}

// notConfirmed stands for the result of an event that was sent, until its confirmation comes. It is compared by identity.
var notConfirmed = &Error{}

// pipeline publishes the events todo on one connection, without waiting for each confirmation. It returns those that may be
// sent again. Without a connection or a free slot it sends nothing and returns todo. Then publish stores the first of them by
// itself, and reports why that fails.
func (b *batch) pipeline(ctx context.Context, todo []int) (again []int) {
	c := b.s.pick()
	if len(todo) == 0 || c == nil {
		return todo
	}
	sl, failure := c.newSlot(c.newInbox()+".>", batchWindow+1) // the one is for the nil of wake
	if failure != nil {
		return todo
	}
	defer c.endSlot(sl)
	timeout := b.cfg.policy().AttemptTimeout // from one confirmation to the next
	sl.wakeAt(clock() + timeout)
	prefix := sl.prefix + strconv.FormatUint(sl.calls, 36) + "." // the position of the event follows
	sent, unconfirmed := 0, 0
	var broken *Error // why the pipeline can't go on
	for broken == nil && (sent < len(todo) || unconfirmed > 0) {
		if sent < len(todo) && unconfirmed < batchWindow && ctx.Err() == nil {
			i := todo[sent]
			sent++
			payload, failure := b.encode(i)
			if failure != nil {
				b.setResult(i, failure)
				continue
			}
			b.failures[i] = notConfirmed
			unconfirmed++
			m := &nats.Msg{Subject: b.target(suffix(i)), Reply: prefix + strconv.Itoa(i), Header: b.header, Data: payload}
			if err := c.nc.PublishMsg(m); err != nil {
				broken = newError(ErrUnavailable, "publishing to %s: %v", b.subject, err)
			}
			continue
		}
		select {
		case m := <-sl.answers:
			if m == nil {
				broken = b.s.whyNoAnswer(c, sl, b.subject)
				continue
			}
			i, err := strconv.Atoi(strings.TrimPrefix(m.Subject, prefix))
			if err == nil && i >= 0 && i < len(b.failures) && b.failures[i] == notConfirmed {
				unconfirmed--
				sl.wakeAt(clock() + timeout)
				_, failure := parsePubAck(m, b.subject)
				b.setResult(i, failure)
			}
		case <-ctx.Done():
			broken = asError(ctx.Err())
		}
	}
	for n, i := range todo {
		if n >= sent {
			b.setResult(i, notRun(newError(broken, "not sent: %s", broken.Message)))
		} else if b.failures[i] == notConfirmed {
			b.setResult(i, newError(broken, "not confirmed: %s", broken.Message))
		}
		if retryable(b.failures[i]) {
			again = append(again, i)
		}
	}
	return again
}

// Subscribe makes fn the handler of the events whose <domain>.<type> matches pattern. In a pattern, * stands for one token, and >
// at the end stands for one or more tokens. Examples are payment.captured, payment.*, *.created, order.> and >. The subscription
// is durable and belongs to the service: the instances of the service share the events, and the server keeps the position in the
// stream even while no instance runs.
//
// Each event is handled at least once. It is acknowledged when fn returns nil. After an error or a panic it is redelivered
// after a pause ([Backoff]). If fn fails at delivery number [Attempts] or later, the event becomes a dead letter; see
// [Service.DeadLetters]. An event that can't be decoded into T, or for which fn returns [Permanent], becomes a dead letter at
// once. An event for which fn returns [RetryAfter] is handled again later, which does not count as an attempt.
//
// fn's ctx ends after [Deadline], or when Stop's time is up. If the process of a handler dies, the event is redelivered after 10
// s, the ack wait of the consumer. If Stop's time is up before a handler has returned nil, the event is redelivered too. Such
// deliveries count as attempts, although they have no result. Therefore an event may be delivered up to three times more than
// Attempts says. If these deliveries have no result either, the event becomes a dead letter without another call of fn. While the
// connection is lost, handlers continue, and their events are acknowledged when the connection is back.
//
// A subscription is identified by its pattern, or by the name that [Durable] sets. If the pattern is changed, there is a new
// subscription, which begins with the next event that is published, or with the oldest event that the stream still has
// ([FromStart]). The old subscription stays until an operator removes its consumer (nats consumer rm AEGIS_EVENTS <name>).
//
// Events are handled concurrently, up to [Concurrency] at once in each instance, and in no particular order unless Concurrency is
// 1. With 1, if fn still runs after its ctx has ended, another instance may begin the next event meanwhile.
//
// Subscribe does not block before [Service.Start]. After Start, Subscribe also makes the consumer, and blocks for [WithTimeout]
// at most.
//
// Errors:
//   - [ErrInvalid] if pattern or an option is invalid, if fn is nil, or if the service has a subscription of that name already
//   - [ErrClosed] after Stop
//
// Before Start, these errors are returned by Start too. After Start, there are also those of making the consumer:
//   - [ErrUnavailable] if there is no connection or no JetStream
//   - [ErrTimeout] if JetStream does not answer
//   - [ErrInvalid] if the stream AEGIS_EVENTS or AEGIS_DEAD, or the consumer, exists but can't be used
//   - [ErrDenied] if the server's permissions do not allow it
func Subscribe[T any](s *Service, pattern string, fn func(context.Context, Event[T]) error, opts ...HandlerOption) error {
	if fn == nil {
		return s.noteRegistration(newError(ErrInvalid, "events %q: the function is nil", pattern))
	}
	return s.noteRegistration(s.subscribe(pattern, typed("", func(ctx context.Context, r *request, m *Message, data T) (any, error) {
		d := r.delivery
		ev := Event[T]{ID: r.id, Source: m.Source, Time: d.time, Sequence: d.sequence, Attempt: d.attempt, Data: data}
		ev.Version = m.Header.Get(headerVersion)
		ev.Domain, ev.Type, _ = strings.Cut(strings.TrimPrefix(m.Subject, eventPrefix), ".")
		return nil, fn(ctx, ev)
	}), opts))
}

func (s *Service) subscribe(pattern string, handler HandlerFunc, opts []HandlerOption) error {
	tokens := strings.Split(pattern, ".")
	for i, token := range tokens {
		last := i == len(tokens)-1
		if !isName(token, maxEventToken) && token != "*" && !(token == ">" && last) || last && i == 0 && token != ">" {
			return newError(ErrInvalid, "events %q: want domain.type, either may be *, or > at the end", pattern)
		}
	}
	cfg, failure := s.newHandlerConfig(kindEvent, opts)
	if failure != nil {
		return failure
	}
	e := &endpoint{kind: kindEvent, name: cmp.Or(deref(cfg.durable), pattern), subject: eventPrefix + pattern, handler: handler}
	allowed := strings.NewReplacer(".", "~", "*", "+", ">", "#") // a consumer's name can't contain . * and >
	l := newLane(s.name+"~"+allowed.Replace(e.name), e.subject)
	if cfg.broadcast {
		l.config.Durable += "@" + s.id
		l.config.InactiveThreshold = time.Hour // after which the server deletes the consumer of an instance that is gone
	}
	if !cfg.fromStart {
		l.config.DeliverPolicy = jetstream.DeliverNewPolicy
	}
	if cfg.concurrency == 1 {
		l.config.MaxAckPending = 1
	}
	l.again = redrivePrefix + l.config.Durable + ".*"
	e.source = &eventSource{feed: newFeed(e, cfg, s.eventStream(), l), running: map[uint64]bool{}, failures: map[uint64]*Error{}}
	return s.addEndpoint(e, cfg)
}

// An eventSource is the source of an endpoint's events.
type eventSource struct {
	*feed

	mu       sync.Mutex        // guards the rest
	running  map[uint64]bool   // the sequences of the events that are being handled
	failures map[uint64]*Error // of the last attempts that failed here, by the event's sequence; at most maxFailures
}

const maxFailures = 1024

// markRunning notes that an event is being handled. It reports false if it is already: then it was redelivered because the
// server did not hear that it is.
func (f *eventSource) markRunning(sequence uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.running[sequence] {
		return false
	}
	f.running[sequence] = true
	return true
}

// noteFailure remembers how the latest attempt at an event has failed, for the reason in its dead letter. nil means that there
// will be no other attempt.
func (f *eventSource) noteFailure(sequence uint64, failure *Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if failure == nil {
		delete(f.failures, sequence)
		return
	}
	if _, known := f.failures[sequence]; !known && len(f.failures) == maxFailures {
		for other := range f.failures { // any: nobody says whether another instance has finished its event
			delete(f.failures, other)
			break
		}
	}
	f.failures[sequence] = failure
}

// reasonUnfinished returns the reason for the dead letter of an event whose last deliveries ended without a result. It is the
// last error that this instance has seen, if there is one.
func (f *eventSource) reasonUnfinished(r *request, deliveries int) *Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.failures[r.delivery.sequence], newError(ErrInternal, "not handled again after %d deliveries, because Attempts is %d: "+
		"this instance does not know how they ended; the handler may have failed, crashed or hung, or an acknowledgement was lost",
		deliveries, f.cfg.attempts))
}

// serve handles one event.
func (f *eventSource) serve(m *nats.Msg, arrived time.Time) {
	defer f.release()
	r := f.newRequest(m, arrived)
	switch {
	case r == nil: // newRequest has logged why
	case strings.HasPrefix(m.Subject, redrivePrefix) && !covers(f.lanes[0].again, m.Subject): // it is for another consumer
		f.acknowledge(m, ack)
	case f.svc.timeUp.Load() || !f.admit(r):
		f.giveBack(m)
	case r.delivery.attempt > f.cfg.attempts+extraDeliveries:
		attempts := r.delivery.attempt - 1
		failure := f.reasonUnfinished(r, attempts)
		f.meter.count(r.msg.Source, failure)
		f.deadLetter(r, failure, attempts)
	case f.markRunning(r.delivery.sequence): // otherwise another worker is handling the event, and will acknowledge it
		f.dispatch(r)
	}
}

// done acknowledges an event that was handled. One that was not is redelivered, or becomes a dead letter.
func (f *eventSource) done(r *request, _ []byte, failure *Error) {
	f.mu.Lock()
	delete(f.running, r.delivery.sequence) // before it can be redelivered
	f.mu.Unlock()
	switch {
	case failure == nil:
		f.acknowledge(r.in, ack)
		if r.delivery.attempt > 1 {
			f.noteFailure(r.delivery.sequence, nil)
		}
	case f.svc.base.Err() != nil || r.fenced: // Stop has cancelled the handler, or another instance leads
		f.giveBack(r.in)
	case r.retryAfter != nil && f.storeForLater(r, r.retryAfter.pause):
		f.logOften(r, slog.LevelInfo, "an event is handled again later", "error", failure, "pause", r.retryAfter.pause)
	case r.permanent || r.delivery.attempt >= f.cfg.attempts:
		f.deadLetter(r, failure, r.delivery.attempt)
	default:
		pause := backoff(r.delivery.attempt, f.cfg.backoff, f.cfg.maxBackoff)
		if r.retryAfter != nil {
			pause = r.retryAfter.pause
		}
		f.logOften(r, slog.LevelWarn, "an attempt failed", "error", failure, "attempt", r.delivery.attempt, "pause", pause)
		f.noteFailure(r.delivery.sequence, failure)
		f.acknowledge(r.in, nakAfter(pause))
	}
}

// deadLetter stores an event as a dead letter, and only then acknowledges it. If Stop's time is up before the dead letter is
// stored, the event is redelivered.
func (f *eventSource) deadLetter(r *request, reason *Error, attempts int) {
	if !f.storeDeadLetter(r, reason, attempts) {
		f.acknowledge(r.in, nak)
		return
	}
	f.noteFailure(r.delivery.sequence, nil)
	f.acknowledge(r.in, ack)
}
