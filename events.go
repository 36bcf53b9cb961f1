package aegis

// This file is durable events on JetStream: publishing them (Publish, PublishBatch), handling them (Subscribe, with the loop that
// pulls them from the server), and what becomes of those that can't be handled (dead letters).

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"iter"
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
	redrivePrefix = eventPrefix + "$redrive." // then a consumer, which alone takes it
	deadStream    = "AEGIS_DEAD"
	deadPrefix    = "aegis.dead."
	letterPrefix  = deadPrefix + "letter."   // then a kind and a consumer
	returnPrefix  = deadPrefix + "returned." // then a consumer and a sequence: a delivery that a stop cut short

	headerID       = "Aegis-Id"       // of an event that was redriven or set aside, with headerSubject and headerTime
	headerSubject  = "Aegis-Subject"  // the original one
	headerTime     = "Aegis-Time"     // the original one, as RFC 3339 has it
	headerSource   = "Aegis-Source"   // the publishing service
	headerVersion  = "Aegis-Version"  // of the event
	headerConsumer = "Aegis-Consumer" // of a dead letter
	headerReason   = "Aegis-Reason"   // of a dead letter
	headerAttempts = "Aegis-Attempts" // of a dead letter
	letterRoom     = 2 << 10          // bytes of a dead letter beyond its event
	maxReason      = 512              // bytes
	returnTTL      = 30 * 24 * 3600   // seconds
	maxEventToken  = 128              // characters
	maxIDLength    = 256              // bytes
)

func (s *Service) eventStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: eventStream, Subjects: []string{eventPrefix + ">"}, Replicas: s.cfg.replicas}
}

func (s *Service) deadStream() jetstream.StreamConfig {
	return jetstream.StreamConfig{Name: deadStream, Subjects: []string{deadPrefix + ">"}, AllowMsgTTL: true, Replicas: s.cfg.replicas}
}

// Publishing.

// EventVersion sets an event's version, x.y or x.y.z. It is for [Publish] and [PublishBatch].
func EventVersion(v string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindEvent, "EventVersion(%q): only events have one", v)
		c.check(versionPattern.MatchString(v) || versionPattern.MatchString(v+".0"), "EventVersion(%q): want x.y or x.y.z, such as 1.0", v)
		c.version = v
	}
}

// IdempotencyKey sets the id of an event or a command, 1 to 256 printable ASCII characters without spaces. Of the commands of
// one service and name that are sent with the same key only the first is executed, as long as its outcome is kept; see
// [SendCommand]. Of the events of one domain and type that are published with the same key within the stream's duplicate window
// (2 minutes by default) only the first is stored; publishing another then succeeds without effect. The events of a batch have
// the keys <k>-0, <k>-1 and so on.
func IdempotencyKey(k string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind != kindRPC, "IdempotencyKey(%q): calls have none; see Idempotent", k)
		printable := !strings.ContainsFunc(k, func(r rune) bool { return r <= ' ' || r > '~' })
		c.check(len(k) >= 1 && len(k) <= maxIDLength && printable, "IdempotencyKey(%q): want 1 to %d printable ASCII characters", k, maxIDLength)
		c.key = k
	}
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
		failure = s.keep(ctx, &exchange{subject: p.subject, header: p.header, data: payload}, s.eventStream(), p.cfg, buf)
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
	p := &publication{s: s, cfg: newCallConfig(kindEvent, opts), name: domain + "." + eventType}
	p.subject = eventPrefix + p.name
	for token := range strings.SplitSeq(p.name, ".") {
		if !isName(token, maxEventToken) || strings.Contains(domain, ".") {
			return nil, notRun(newError(ErrInvalid, "event %q: want domain.type, each of a letter, then letters, digits, - and _", p.name))
		}
	}
	if p.cfg.err != nil {
		return nil, p.cfg.err
	}
	p.header = s.envelope(ctx)
	if p.cfg.version != "" {
		p.header[headerVersion] = []string{p.cfg.version}
	}
	p.id = p.name + ":" + p.cfg.key // events of other types may have the same key
	if p.cfg.key == "" {
		p.id = rand.Text()
	}
	return p, nil
}

// envelope is the headers of what is stored, as far as they come from ctx and the service, for the caller to add to.
func (s *Service) envelope(ctx context.Context) nats.Header {
	header, correlation := headersFor(ctx)
	header = withHeader(header, headerSource, s.name)
	if correlation != "" {
		header[headerCorrelation] = []string{correlation}
	}
	return header
}

// encode is the payload of an event, of which value points to the data. It sets the event's headers; its id ends in suffix.
func (p *publication) encode(value any, suffix string) ([]byte, *packer, *Error) {
	data, buf, err := marshal(p.s.cfg.codec, value)
	if err != nil {
		return nil, nil, notRun(newError(ErrInvalid, "encoding the event %s: %v", p.name, err))
	}
	p.header[jetstream.MsgIDHeader] = []string{p.id + suffix}
	delete(p.header, headerContentType)
	if label := contentType(p.s.cfg.codec, data); label != "" {
		p.header[headerContentType] = []string{label}
	}
	if size, limit := messageSize(p.header, data), p.s.conns[0].limit.Load()-letterRoom; size > limit {
		return nil, nil, notRun(newError(ErrInvalid, "the event %s has %d bytes with its headers, more than %d: the server's max_payload, less %d for what a dead letter adds",
			p.name, size, limit, letterRoom))
	}
	return data, buf, nil
}

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

// Codes of the JetStream API.
const (
	noSuitablePeers         = 10005 // servers of a cluster that isn't complete, yet or any more
	temporarilyUnavailable  = 10008 // what a cluster without a leader answers; or it doesn't, and forgets what it was asked
	wrongSequence           = 10071
	wrongSequenceReplicated = 10164
	inProcess               = 10158 // a message of that id is just being stored
)

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
	b := &batch{publication: p, failures: make([]*Error, len(data)), unsure: make([]bool, len(data))}
	b.encode = func(i int) ([]byte, *packer, *Error) { return p.encode(&data[i], "-"+strconv.Itoa(i)) }
	return b.publish(ctx)
}

// A batch is events that are published one after the other.
type batch struct {
	*publication
	encode   func(i int) ([]byte, *packer, *Error)
	failures []*Error // by position
	unsure   []bool   // by position: it may have been stored
}

// publish stores one event like Publish, which finds out what there is to find out, then all that are left in one go; and again
// with those that failed but may be sent again.
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
			if failure = b.s.keep(ctx, x, b.s.eventStream(), b.cfg, buf); failure != nil {
				for _, i := range todo {
					b.fail(i, notRun(newError(failure, "not sent, since event %d failed: %s", first, failure.Message)))
				}
				todo = nil
			}
		}
		b.fail(first, failure)
		todo = b.pipeline(ctx, todo)
	}
	var errs []error
	for i, failure := range b.failures {
		if failure != nil {
			failure.Details = map[string]string{"index": strconv.Itoa(i)}
			failure.NotRun = !b.unsure[i]
			errs = append(errs, failure)
		}
	}
	return errors.Join(errs...)
}

// fail notes what became of an event.
func (b *batch) fail(i int, failure *Error) {
	b.failures[i] = failure
	b.unsure[i] = b.unsure[i] || failure != nil && !failure.NotRun
}

// batchWindow bounds how many events of a batch wait for their confirmation. (The server takes in up to 100,000.)
const batchWindow = 1024

// pipeline publishes todo on one connection, and returns what may be sent again.
func (b *batch) pipeline(ctx context.Context, todo []int) (again []int) {
	if len(todo) == 0 {
		return nil
	}
	c := b.s.pick()
	if c == nil {
		return todo
	}
	sl, failure := c.newSlot(c.newInbox()+".", batchWindow)
	if failure != nil {
		return todo
	}
	defer c.endSlot(sl)
	sl.drops, sl.since = c.drops.Load(), clock()
	silence := b.cfg.policy().AttemptTimeout
	extend := func() { sl.await(clock() + silence) }
	extend()
	prefix := sl.prefix + strconv.FormatUint(sl.calls, 36) + "." // the index in todo follows
	answered := make([]bool, len(todo))
	sent, waiting := 0, 0
	var broken *Error // why it can't go on
	receive := func() {
		var m *nats.Msg
		select {
		case m = <-sl.answers:
		case <-ctx.Done():
			broken = asError(ctx.Err())
			return
		}
		if m == nil {
			broken = b.s.over(c, sl, b.subject)
			return
		}
		if k, err := strconv.Atoi(strings.TrimPrefix(m.Subject, prefix)); err == nil && k >= 0 && k < sent && !answered[k] {
			answered[k] = true
			waiting--
			extend()
			_, failure := stored(m, b.subject)
			b.fail(todo[k], failure)
		}
	}
	for broken == nil && (sent < len(todo) || waiting > 0) {
		if sent == len(todo) || waiting == batchWindow || ctx.Err() != nil {
			receive()
			continue
		}
		k, i := sent, todo[sent]
		sent++
		data, buf, failure := b.encode(i)
		if failure == nil {
			err := c.nc.PublishMsg(&nats.Msg{Subject: b.subject, Reply: prefix + strconv.Itoa(k), Header: b.header, Data: data})
			buf.release() // nats.go has copied it
			if err == nil {
				waiting++
				continue
			}
			failure = newError(ErrUnavailable, "publishing to %s: %v", b.subject, err)
			broken = failure
		}
		answered[k] = true
		b.fail(i, failure)
	}
	for k, i := range todo {
		if k >= sent {
			b.fail(i, notRun(newError(broken, "not sent: %s", broken.Message)))
		} else if !answered[k] {
			b.fail(i, newError(broken, "not confirmed: %s", broken.Message))
		}
		if mayPass(b.failures[i]) {
			again = append(again, i)
		}
	}
	return again
}

// Streams and consumers.

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

// covers tells whether all subjects that match the pattern sub match pattern, too.
func covers(pattern, sub string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(sub, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s), s[i] == ">", token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// Subscribing.

// Broadcast gives each event to every instance, which otherwise share them. An instance that crashes gets what it missed if
// another with its id ([WithID]) starts within an hour; otherwise an instance gets events from its start until it stops.
func Broadcast() HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "Broadcast(): only events can be broadcast")
		c.broadcast = true
	}
}

// Durable names a subscription: letters, digits, - and _, at most 64. It is needed for the second one of a service to the same
// pattern. A name belongs to its pattern; it can't be used for another one later.
func Durable(name string) HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "Durable(%q): only subscriptions to events have a name", name)
		c.check(isToken(name, 64), "Durable(%q): want 1 to 64 of a-z, A-Z, 0-9, - and _", name)
		c.durable = name
	}
}

// FromStart begins a new subscription with the oldest event of the stream. The default is to begin with what is published from
// the first Start on. It has no effect on a subscription that exists.
func FromStart() HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "FromStart(): only events are kept")
		c.replays = true
	}
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
	cfg, err := s.handlerConfig(kindEvent, opts)
	if err != nil {
		return err
	}
	if cfg.broadcast && cfg.exclusive {
		return newError(ErrInvalid, "events %q: Broadcast() is for all instances, Exclusive() for one: choose", pattern)
	}
	e := &endpoint{kind: kindEvent, name: cmp.Or(cfg.durable, pattern), subject: eventPrefix + pattern, run: run}
	// The name of the consumer, in which . * > can't be.
	name := s.name + "~" + cmp.Or(cfg.durable, strings.NewReplacer(".", "~", "*", "+", ">", "#").Replace(pattern))
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
	return s.register(e, cfg)
}

const (
	maxAckPending = 1 << 16 // events of a subscription that are handled, or wait for their next attempt
	maxWaiting    = 1 << 12 // requests for events, of all instances
)

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

// A subscription is an endpoint's events.
type subscription struct{ *feed }

// serve handles one event.
func (f *subscription) serve(m *nats.Msg, arrived time.Time) {
	defer f.release()
	d := f.delivery(m)
	if d == nil {
		f.svc.log.Warn("what was no event was dropped", "endpoint", f.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		return
	}
	if consumer, ok := strings.CutPrefix(m.Subject, redrivePrefix); ok && consumer != f.lanes[0].config.Durable {
		f.tell(m, "+ACK")
		return
	}
	r := f.newRequest(m, d, arrived)
	if f.svc.draining.Load() || !f.admit(r) {
		f.giveBack(r)
		return
	}
	if d.attempt > f.cfg.attempts {
		used, ok := f.used(r)
		if !ok {
			f.tell(m, "-NAK")
			return
		}
		if used > f.cfg.attempts {
			failure := newError(ErrInternal, "delivered %d times and never finished: its handler crashed or hung, or its instance or an acknowledgement was lost", used-1)
			f.meter.ended(r.msg.Source, failure)
			f.setAside(r, failure, used-1)
			return
		}
	}
	f.dispatch(r)
}

// done acknowledges what was handled, and sees to what was not.
func (f *subscription) done(r *request, _ []byte, failure *Error) {
	switch {
	case failure == nil:
		f.tell(r.in, "+ACK")
	case f.svc.base.Err() != nil: // it was told to end, see interrupt
		f.tell(r.in, "-NAK")
	case r.fenced:
		f.giveBack(r)
	case r.hopeless:
		f.setAside(r, failure, r.delivery.attempt)
	case r.delivery.attempt < f.cfg.attempts:
		f.retry(r, failure)
	default:
		if used, ok := f.used(r); ok && used >= f.cfg.attempts {
			f.setAside(r, failure, used)
		} else {
			f.retry(r, failure)
		}
	}
}

// giveBack lets another instance have the event, as if it hadn't been delivered.
func (f *subscription) giveBack(r *request) {
	f.noteReturn(r.in, r.delivery)
	f.tell(r.in, f.returned())
}

// setAside stores a dead letter, and only then acknowledges the event.
func (f *subscription) setAside(r *request, failure *Error, attempts int) {
	if f.bury(r, failure, attempts) {
		f.tell(r.in, "+ACK")
	} else {
		f.tell(r.in, "-NAK")
	}
}

// tell acknowledges a delivery one way or the other. If that is lost, the event is delivered again after its ack wait.
func (f *feed) tell(m *nats.Msg, what string) { f.svc.notify(m.Reply, []byte(what)) }

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

func nakAfter(pause time.Duration) string {
	return `-NAK {"delay":` + strconv.FormatInt(int64(pause), 10) + "}"
}

// interrupt is called before the ctx of those that run ends, since Stop's time is up.
func (f *subscription) interrupt() {
	var all sync.WaitGroup
	for _, m := range f.handling() {
		if d := f.delivery(m); d != nil {
			all.Go(func() { f.noteReturn(m, d) })
		}
	}
	all.Wait()
}

// noteReturn notes that a delivery which the server counts is no attempt; see used.
func (f *feed) noteReturn(m *nats.Msg, d *delivery) {
	x := exchange{subject: f.returns(d), header: nats.Header{
		jetstream.MsgTTLHeader: {strconv.Itoa(returnTTL)},
		jetstream.MsgIDHeader:  {f.returns(d) + "." + strconv.Itoa(d.attempt)},
	}}
	if failure := f.svc.storeLetter(&x, returnTimeout); failure != nil {
		f.svc.log.Warn("an event that is given back loses an attempt", "endpoint", f.name, "correlation_id", cmp.Or(m.Header.Get(headerCorrelation), d.id), "error", failure)
	}
}

func (f *feed) returns(d *delivery) string {
	return returnPrefix + f.lanes[0].config.Durable + "." + strconv.FormatUint(d.sequence, 10)
}

// used is how many attempts there were, the present one included; not ok if Stop's time is up.
func (f *feed) used(r *request) (n int, ok bool) {
	subject := f.returns(r.delivery)
	ok = f.insist(r, "an event's attempts can't be counted", func(ctx context.Context) *Error {
		stream, failure := f.svc.provide(ctx, f.svc.deadStream(), subject)
		if failure != nil {
			return failure
		}
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter(subject))
		if err != nil {
			return jetStreamError(ctx, err, "the stream "+deadStream)
		}
		n = r.delivery.attempt - int(info.State.Subjects[subject])
		return nil
	})
	return n, ok
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

// Dead letters.

// A DeadLetter is a message that could not be handled, whole.
type DeadLetter struct {
	Subject, Consumer, Reason string // the full subject; who failed it; the last error
	Attempts                  int
	Time                      time.Time // when it was set aside
	Header                    nats.Header
	Data                      []byte
	Sequence                  uint64 // its number among the dead letters
}

// bury stores a dead letter. It is not ok if Stop's time is up before that.
func (f *feed) bury(r *request, failure *Error, attempts int) bool {
	d := r.delivery
	reason := failure.Error()
	own := nats.Header{
		headerSubject:         {r.msg.Subject},
		headerID:              {d.id},
		headerTime:            {d.time.Format(time.RFC3339Nano)},
		headerConsumer:        {d.consumer},
		headerReason:          {strings.Map(printable, reason[:min(len(reason), maxReason)])},
		headerAttempts:        {strconv.Itoa(attempts)},
		jetstream.MsgIDHeader: {d.consumer + "-" + strconv.FormatUint(d.sequence, 10) + "-" + strconv.FormatInt(d.time.UnixNano(), 36)},
	}
	x := exchange{subject: f.letters(), header: copyHeader(r.in.Header), data: r.in.Data}
	maps.Copy(x.header, own)
	if messageSize(x.header, x.data)+64 > f.svc.conns[0].limit.Load() { // it is not from Publish, which leaves room
		x.header, x.data = own, nil
		own[headerReason] = []string{"(too large to be copied, see sequence " + strconv.FormatUint(d.sequence, 10) + " of " + f.stream.Name + ") " + own[headerReason][0]}
	}
	if !f.insist(r, "a dead letter can't be stored", func(context.Context) *Error { return f.svc.storeLetter(&x, 5*time.Second) }) {
		return false
	}
	f.meter.dead.Add(1)
	f.logger(r).Error("set aside as a dead letter", "error", failure, "attempts", attempts)
	return true
}

func (f *feed) letters() string { return letterPrefix + f.kind + "." + f.lanes[0].config.Durable }

// copyHeader is h without what would tell the server something, and what nats.go wouldn't send.
func copyHeader(h nats.Header) nats.Header {
	out := make(nats.Header, len(h)+8)
	for key, values := range h {
		odd := strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r) })
		if !strings.HasPrefix(key, "Nats-") && key != "" && !odd {
			out[key] = values
		}
	}
	return out
}

func printable(r rune) rune {
	if r < ' ' {
		return ' '
	}
	return r
}

// storeLetter puts x into the stream of dead letters.
func (s *Service) storeLetter(x *exchange, limit time.Duration) *Error {
	_, failure := s.store(context.Background(), x.within(context.Background(), limit), s.deadStream())
	return failure
}

// DeadLetters yields the dead letters of all services that there are now, oldest first, and ends; with an error if one can't be
// read. It asks the server for one at a time, each until ctx ends or for 5 s.
func (s *Service) DeadLetters(ctx context.Context) iter.Seq2[DeadLetter, error] {
	return func(yield func(DeadLetter, error) bool) {
		js, failure := s.jetStream()
		if failure != nil {
			yield(DeadLetter{}, failure)
			return
		}
		ctx, done := s.asking(ctx)
		defer done()
		stream, err := js.Stream(ctx, deadStream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return // nothing has failed yet
		}
		for seq := uint64(1); err == nil; seq++ {
			var m *jetstream.RawStreamMsg
			if m, err = stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(letterPrefix+">")); errors.Is(err, jetstream.ErrMsgNotFound) {
				return
			}
			if err != nil {
				break
			}
			if seq = m.Sequence; seq > stream.CachedInfo().State.LastSeq || !yield(letterOf(m), nil) {
				return
			}
		}
		yield(DeadLetter{}, jetStreamError(ctx, err, "the stream "+deadStream))
	}
}

func letterOf(m *jetstream.RawStreamMsg) DeadLetter {
	d := DeadLetter{
		Subject:  m.Header.Get(headerSubject),
		Consumer: m.Header.Get(headerConsumer),
		Reason:   m.Header.Get(headerReason),
		Time:     m.Time,
		Header:   copyHeader(m.Header),
		Data:     m.Data,
		Sequence: m.Sequence,
	}
	d.Attempts, _ = strconv.Atoi(m.Header.Get(headerAttempts))
	for _, key := range []string{headerConsumer, headerReason, headerAttempts} {
		delete(d.Header, key)
	}
	return d
}

// Redrive has a dead letter handled again, with fresh attempts, by the consumer that failed it and no one else, and removes it. Its
// Header and Data may have been mended. The event keeps its id, time and subject; its Sequence is new.
//
// Errors: [ErrNotFound] if the letter was redriven already or its consumer is no more, [ErrInvalid] if d is not from
// [Service.DeadLetters], and those of [Publish].
func (s *Service) Redrive(ctx context.Context, d DeadLetter) error {
	if d.Sequence == 0 || d.Consumer == "" {
		return notRun(newError(ErrInvalid, "Redrive: sequence %d, consumer %q: not a dead letter of DeadLetters", d.Sequence, d.Consumer))
	}
	js, failure := s.jetStream()
	if failure != nil {
		return failure
	}
	ctx, done := s.asking(ctx)
	defer done()
	dead, err := js.Stream(ctx, deadStream)
	if err != nil {
		return jetStreamError(ctx, err, "the stream "+deadStream)
	}
	switch m, err := dead.GetMsg(ctx, d.Sequence); {
	case err != nil:
		return jetStreamError(ctx, err, "dead letter "+strconv.FormatUint(d.Sequence, 10))
	case !m.Time.Equal(d.Time):
		return notRun(newError(ErrNotFound, "dead letter %d of %v is no more: there is another one in its place", d.Sequence, d.Time))
	}
	if strings.HasPrefix(d.Subject, commandPrefix) {
		if failure := s.redriveCommand(ctx, d); failure != nil {
			return failure
		}
		return removeLetter(ctx, dead, d)
	}
	consumer, err := js.Consumer(ctx, eventStream, d.Consumer)
	if err != nil {
		return jetStreamError(ctx, err, "the consumer "+d.Consumer+" of "+eventStream)
	}
	subject := redrivePrefix + d.Consumer
	have := consumer.CachedInfo().Config
	if !slices.ContainsFunc(append(have.FilterSubjects, have.FilterSubject), func(p string) bool { return covers(p, subject) }) {
		return notRun(newError(ErrInvalid, "the consumer %s of %s doesn't take %s: add that to its filter, and to the subjects of the stream", d.Consumer, eventStream, subject))
	}
	h := copyHeader(d.Header)
	h[headerSubject] = []string{d.Subject}
	h[jetstream.MsgIDHeader] = []string{"redrive-" + strconv.FormatUint(d.Sequence, 10) + "-" + strconv.FormatInt(d.Time.UnixNano(), 36)}
	x := &exchange{subject: subject, header: h, data: d.Data}
	if failure := s.keep(ctx, x, s.eventStream(), callConfigs[kindEvent], nil); failure != nil {
		return failure
	}
	return removeLetter(ctx, dead, d)
}

func removeLetter(ctx context.Context, dead jetstream.Stream, d DeadLetter) error {
	if err := dead.DeleteMsg(ctx, d.Sequence); err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		return jetStreamError(ctx, err, "it was redriven, but removing the dead letter "+strconv.FormatUint(d.Sequence, 10))
	}
	return nil
}
