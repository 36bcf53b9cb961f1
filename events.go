package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file is durable events: publishing them (Publish, PublishBatch) and handling them (Subscribe).

// An Event is what a handler of [Subscribe] is called with.
type Event[T any] struct {
	// ID is the same however often the event is sent or delivered: what [IdempotencyKey] set, else a random one.
	ID string
	// Domain and Type are the tokens of its subject, events.<domain>.<type>.
	Domain, Type string
	// Version is that of [EventVersion], "" if none was set.
	Version string
	// Source is the service that published it, by its own account.
	Source string
	// Time is when the server stored it first.
	Time time.Time
	// Sequence is its number in the stream. It rises, with gaps.
	Sequence uint64
	// Attempt counts deliveries from 1. It is more than 1 after a failure, a crash, a lost acknowledgement, or a Stop that cut
	// the handler short.
	Attempt int
	Data    T
}

const (
	eventStream   = "AEGIS_EVENTS"
	eventPrefix   = "events."
	redrivePrefix = eventPrefix + "$redrive." // a consumer follows, which alone takes the event

	headerID      = "Aegis-Id"      // of a command; of an event that was redriven or became a dead letter, like the next two
	headerSubject = "Aegis-Subject" // the original one
	headerTime    = "Aegis-Time"    // the original one, in RFC 3339
	headerSource  = "Aegis-Source"  // the publishing service
	headerVersion = "Aegis-Version" // of the event
	maxEventToken = 128             // characters
)

func (s *Service) eventStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: eventStream, Subjects: []string{eventPrefix + ">"}, Replicas: s.cfg.replicas}
}

// Publish stores an event in the stream AEGIS_EVENTS, under events.<domain>.<eventType>, and returns when the server has
// confirmed that; the stream is made if there is none. domain is [A-Za-z][A-Za-z0-9_-]*, eventType one or more of those,
// separated by dots. It blocks until ctx ends at most, or for [WithTimeout] if ctx has no deadline.
//
// Every event has an id, so that one that is sent twice is stored once. Therefore an event whose confirmation is missing is
// sent again as [Retry] does for an Idempotent call, by default up to 3 times in all; with [Sticky] until ctx ends.
//
// Errors: [ErrInvalid] for a name or an option that is out of range, or an event that can't be encoded or comes within 2 KiB of
// the server's max_payload (its dead letter has to fit too); [ErrUnavailable] if there is no connection or no JetStream;
// [ErrTimeout], [ErrCanceled], [ErrClosed]; [ErrDenied] by the server's permissions; and what the stream refuses with, such as [ErrUnavailable] when it is full. Unless the
// error's NotRun is set, the event may have been stored.
func Publish[T any](ctx context.Context, s *Service, domain, eventType string, data T, opts ...CallOption) error {
	p, failure := s.newPublication(ctx, domain, eventType, opts)
	if failure != nil {
		return failure
	}
	payload, buf, failure := p.encode(&data, "")
	if failure == nil {
		failure = s.storeWithRetries(ctx, &exchange{subject: p.subject, header: p.header, data: payload}, s.eventStream(), p.cfg, buf)
	}
	return failure.orNil()
}

// A publication is one event, or those of a batch, but for their payloads.
type publication struct {
	s       *Service
	cfg     *callConfig
	name    string // <domain>.<type>
	subject string
	header  nats.Header
	id      string
}

func (s *Service) newPublication(ctx context.Context, domain, eventType string, opts []CallOption) (*publication, *Error) {
	cfg, failure := newCallConfig(kindEvent, opts)
	if failure != nil {
		return nil, failure
	}
	p := &publication{s: s, cfg: cfg, name: domain + "." + eventType}
	p.subject = eventPrefix + p.name
	for token := range strings.SplitSeq(p.name, ".") {
		if !isName(token, maxEventToken) || strings.Contains(domain, ".") {
			return nil, notRun(newError(ErrInvalid, "event %q: want domain.type, each of a letter, then letters, digits, - and _", p.name))
		}
	}
	p.header = s.newHeader(ctx)
	if cfg.version != nil {
		p.header[headerVersion] = []string{*cfg.version}
	}
	if p.id = rand.Text(); cfg.key != nil {
		p.id = p.name + ":" + *cfg.key // events of other types may have the same key
	}
	return p, nil
}

// newHeader returns the headers of a message to be stored, as far as they come from ctx and the service. The caller may add to them.
func (s *Service) newHeader(ctx context.Context) nats.Header {
	header, correlation := headersFor(ctx)
	header = withHeader(header, headerSource, s.name)
	if correlation != "" {
		header[headerCorrelation] = []string{correlation}
	}
	return header
}

// completeHeader adds the content type of data if receivers could not detect it, and checks the size of the message.
func (s *Service) completeHeader(header nats.Header, data []byte, what string) *Error {
	delete(header, headerContentType)
	if label := contentType(s.cfg.codec, data); label != "" {
		header[headerContentType] = []string{label}
	}
	if size, limit := messageSize(header, data), s.conns[0].limit.Load()-letterRoom; size > limit {
		return notRun(newError(ErrInvalid, "%s has %d bytes with its headers, more than %d: the server's max_payload, less %d for what a dead letter adds",
			what, size, limit, letterRoom))
	}
	return nil
}

// encode returns the payload of an event, of which value points to the data, and sets the event's headers. Its id ends in suffix.
func (p *publication) encode(value any, suffix string) ([]byte, *packer, *Error) {
	data, buf, err := marshal(p.s.cfg.codec, value)
	if err != nil {
		return nil, nil, notRun(newError(ErrInvalid, "encoding the event %s: %v", p.name, err))
	}
	p.header[jetstream.MsgIDHeader] = []string{p.id + suffix}
	return data, buf, p.s.completeHeader(p.header, data, "the event "+p.name)
}

// PublishBatch publishes data in order, without waiting for the confirmation of one event before it sends the next, and returns
// when each was confirmed or has failed. Without a deadline in ctx, it gives up when none was confirmed for [WithTimeout].
//
// Each failure is told: the error joins (see [errors.Join]) an [*Error] for every event that failed, with its position in
// Details["index"]. Options, resending and errors are those of [Publish]; events that had to be sent again are not in order.
func PublishBatch[T any](ctx context.Context, s *Service, domain, eventType string, data []T, opts ...CallOption) error {
	p, failure := s.newPublication(ctx, domain, eventType, opts)
	if failure != nil {
		return failure
	}
	b := &batch{publication: p, failures: make([]*Error, len(data)), mayBeStored: make([]bool, len(data))}
	b.encode = func(i int) ([]byte, *packer, *Error) { return p.encode(&data[i], "-"+strconv.Itoa(i)) }
	return b.publish(ctx)
}

// A batch is events that are published one after the other.
type batch struct {
	*publication
	encode    func(i int) ([]byte, *packer, *Error)
	failures  []*Error // by position
	mayBeStored []bool   // by position: the event may have been stored
}

// publish stores one event like Publish, which finds out whether publishing works, and then all others at once. It repeats that with
// the events that failed and may be sent again.
func (b *batch) publish(ctx context.Context) error {
	todo := make([]int, len(b.failures))
	for i := range todo {
		todo[i] = i
	}
	for len(todo) > 0 {
		first := todo[0]
		todo = todo[1:]
		data, buf, failure := b.encode(first)
		if failure == nil {
			x := &exchange{subject: b.subject, header: maps.Clone(b.header), data: data}
			if failure = b.s.storeWithRetries(ctx, x, b.s.eventStream(), b.cfg, buf); failure != nil {
				for _, i := range todo {
					b.setResult(i, notRun(newError(failure, "not sent, because event %d failed: %s", first, failure.Message)))
				}
				todo = nil
			}
		}
		b.setResult(first, failure)
		todo = b.pipeline(ctx, todo)
	}
	var errs []error
	for i, failure := range b.failures {
		if failure != nil {
			failure.Details = map[string]string{"index": strconv.Itoa(i)}
			failure.NotRun = !b.mayBeStored[i]
			errs = append(errs, failure)
		}
	}
	return errors.Join(errs...)
}

func (b *batch) setResult(i int, failure *Error) {
	b.failures[i] = failure
	b.mayBeStored[i] = b.mayBeStored[i] || failure != nil && !failure.NotRun
}

// batchWindow is how many events of a batch may wait for their confirmation. (The server accepts up to 100,000.)
const batchWindow = 1024

// These stand for the failures of events in pipeline until their results are known. They are compared by identity.
var notSent, notConfirmed = &Error{}, &Error{}

// pipeline publishes the events todo on one connection, and returns those that may be sent again.
func (b *batch) pipeline(ctx context.Context, todo []int) (again []int) {
	c := b.s.pick()
	if len(todo) == 0 || c == nil {
		return todo
	}
	sl, failure := c.newSlot(c.newInbox()+".", batchWindow)
	if failure != nil {
		return todo
	}
	defer c.endSlot(sl)
	sl.drops, sl.since = c.drops.Load(), clock()
	timeout := b.cfg.policy().AttemptTimeout // since the last confirmation
	sl.wakeAt(clock() + timeout)
	prefix := sl.prefix + strconv.FormatUint(sl.calls, 36) + "." // the position of the event follows
	unconfirmed := 0
	var broken *Error // why it can't go on
	receive := func() {
		select {
		case m := <-sl.answers:
			if m == nil {
				broken = b.s.answerLost(c, sl, b.subject)
				return
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
	for _, i := range todo {
		b.failures[i] = notSent
	}
	for sent := 0; broken == nil && (sent < len(todo) || unconfirmed > 0); {
		if sent == len(todo) || unconfirmed == batchWindow || ctx.Err() != nil {
			receive()
			continue
		}
		i := todo[sent]
		sent++
		data, buf, failure := b.encode(i)
		if failure == nil {
			b.failures[i] = notConfirmed
			unconfirmed++
			if err := c.nc.PublishMsg(&nats.Msg{Subject: b.subject, Reply: prefix + strconv.Itoa(i), Header: b.header, Data: data}); err != nil {
				broken = newError(ErrUnavailable, "publishing to %s: %v", b.subject, err)
			}
			buf.release() // nats.go has copied it
		} else {
			b.setResult(i, failure)
		}
	}
	for _, i := range todo {
		switch b.failures[i] {
		case notSent:
			b.setResult(i, notRun(newError(broken, "not sent: %s", broken.Message)))
		case notConfirmed:
			b.setResult(i, newError(broken, "not confirmed: %s", broken.Message))
		}
		if retryable(b.failures[i]) {
			again = append(again, i)
		}
	}
	return again
}

// Subscribe handles the events whose <domain>.<type> matches pattern, in which * stands for one token and a > at the end for
// all that follow: payment.captured, payment.*, *.created, order.>. The subscription is durable: the server keeps its place in the
// stream for the service as a whole, whose instances share the events, also while none of them runs.
//
// Each event is handled at least once. When fn returns nil, it is acknowledged. After an error or a panic it is delivered again
// after a pause ([Backoff]), up to [Attempts] times in all; one whose handler died with its process, after 10 s. Then it is set
// aside as a dead letter, as is at once what can't be decoded into T; see [Service.DeadLetters]. Events are handled
// concurrently and in no order, unless [Concurrency] is 1. fn's ctx ends after [Deadline], or when Stop's time is up; what Stop
// cuts short is given back without using up an attempt.
//
// Subscribe fails with [ErrInvalid] if the pattern or an option is out of range or there is a subscription of that name, with
// [ErrClosed] after Stop. Once the service was started it fails, as [Service.Start] does before, with [ErrUnavailable] without
// JetStream, and with [ErrInvalid] if the stream AEGIS_EVENTS or AEGIS_DEAD exists but can't be used.
func Subscribe[T any](s *Service, pattern string, fn func(context.Context, Event[T]) error, opts ...HandlerOption) error {
	if fn == nil {
		return newError(ErrInvalid, "events %q: the function is nil", pattern)
	}
	return s.subscribe(pattern, func(ctx context.Context, m *Message) ([]byte, error) {
		var ev Event[T]
		r, err := decode(ctx, m, &ev.Data)
		if err != nil {
			return nil, err
		}
		d := r.delivery
		ev.ID, ev.Source, ev.Version, ev.Time, ev.Sequence, ev.Attempt = d.id, m.Source, m.Header.Get(headerVersion), d.time, d.sequence, d.attempt
		ev.Domain, ev.Type, _ = strings.Cut(strings.TrimPrefix(m.Subject, eventPrefix), ".")
		return nil, fn(ctx, ev)
	}, opts)
}

func (s *Service) subscribe(pattern string, run HandlerFunc, opts []HandlerOption) error {
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
	e := &endpoint{kind: kindEvent, name: cmp.Or(deref(cfg.durable), pattern), subject: eventPrefix + pattern, run: run}
	// The name of the consumer can't contain . * and >.
	name := s.name + "~" + cmp.Or(deref(cfg.durable), strings.NewReplacer(".", "~", "*", "+", ">", "#").Replace(pattern))
	if cfg.broadcast {
		name += "@" + s.id
	}
	l := newLane(name, e.subject)
	l.redrive = redrivePrefix + name
	if !cfg.replays {
		l.config.DeliverPolicy = jetstream.DeliverNewPolicy
	}
	if cfg.broadcast {
		l.config.InactiveThreshold = time.Hour
	}
	if cfg.concurrency == 1 {
		l.config.MaxAckPending = 1
	}
	e.source = &subscription{newFeed(e, cfg, s.eventStream(), l)}
	return s.addEndpoint(e, cfg)
}

// A subscription is the source of an endpoint's events.
type subscription struct{ *feed }

// serve handles one event.
func (f *subscription) serve(m *nats.Msg, arrived time.Time) {
	defer f.release()
	d := f.delivery(m)
	if d == nil {
		f.svc.log.Warn("dropped a message that is not an event", "endpoint", f.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		return
	}
	if consumer, ok := strings.CutPrefix(m.Subject, redrivePrefix); ok && consumer != f.lanes[0].config.Durable {
		f.acknowledge(m, ack)
		return
	}
	r := f.newRequest(m, d, arrived)
	switch {
	case f.svc.draining.Load() || !f.admit(r):
		f.giveBack(m)
	case d.attempt > f.cfg.attempts+tolerance:
		failure := newError(ErrInternal, "delivered %d times and never finished: its handler crashed or hung, or its instance or an acknowledgement was lost", d.attempt-1)
		f.meter.ended(r.msg.Source, failure)
		f.deadLetter(r, failure, d.attempt-1)
	default:
		f.dispatch(r)
	}
}

// done acknowledges an event that was handled, or sees to one that could not be handled.
func (f *subscription) done(r *request, _ []byte, failure *Error) {
	switch {
	case failure == nil:
		f.acknowledge(r.in, ack)
	case f.svc.base.Err() != nil || r.fenced: // Stop has cancelled the handler, or another instance leads
		f.giveBack(r.in)
	case r.permanent || r.delivery.attempt >= f.cfg.attempts:
		f.deadLetter(r, failure, r.delivery.attempt)
	default:
		f.retry(r, failure)
	}
}

// deadLetter stores an event as a dead letter, and only then acknowledges it.
func (f *subscription) deadLetter(r *request, failure *Error, attempts int) {
	how := nak
	if f.storeDeadLetter(r, failure, attempts) {
		how = ack
	}
	f.acknowledge(r.in, how)
}
