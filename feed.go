package aegis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the feed, which brings stored messages to an endpoint: it makes the consumers, asks them for messages,
// acknowledges these, and keeps the server from redelivering a message while it is being handled.

const (
	maxAckPending = 1 << 16 // messages of a consumer that are being handled or wait for their next attempt, in all instances
	maxWaiting    = 1 << 12 // pull requests that wait at a consumer, from all instances

	fetchTick     = 250 * time.Millisecond // between checks of the connection; also the shortest bound of a pause after a failure
	fetchExpiry   = time.Second            // after which the server ends a pull request
	fetchSlack    = time.Second            // for the server's report of that to arrive
	checkInterval = 15 * time.Second       // after which fetch checks the consumers again

	pendingTimeout = 250 * time.Millisecond // for asking the server how many messages wait
	pendingAge     = time.Second            // after which it is asked again

	extraDeliveries = 3 // how many deliveries beyond Attempts there may be, because some may have ended without a result
)

// The ways to acknowledge a delivery.
const (
	ack           = "+ACK"
	nak           = "-NAK"
	ackTerminate  = "+TERM"
	ackInProgress = "+WPI"
)

// A feed is a source that brings an endpoint the messages of pull consumers of a stream. It asks for as many messages as can be
// handled at once and no more, so that what was delivered is being handled, and the rest waits in the server.
type feed struct {
	*endpoint
	cfg      *handlerConfig
	stream   jetstream.StreamConfig // used to make the stream if it does not exist
	lanes    []*lane                // the most urgent first
	claimed  atomic.Int64           // how many messages are asked for, wait in the queue, or are being handled
	requests atomic.Int32           // to the consumers, that have not come to their end
	starts   int                    // messages brought since the lanes were asked in reverse order, or were all empty
	ackWait  atomic.Int64           // the shortest ack wait of the consumers
	active   atomic.Bool            // whether to ask for messages; see share
	failed   atomic.Bool            // whether a pull request has failed since fetch looked last
	wake     chan struct{}          // tells fetch that it can ask for more, or that active has changed
	inspect  func()                 // called at intervals while messages may be handled, unless it is nil

	counting sync.Mutex    // guards counted, and pending of the lanes
	counted  time.Duration // when the server was last asked for pending, by the clock

	fetching sync.WaitGroup     // counts fetch, and the requests to parked lanes
	mu       sync.Mutex         // guards the rest
	drained  bool               // whether drain was called
	cancel   context.CancelFunc // ends fetch, if that has begun
}

// A lane is one of a feed's consumers. The fields from maxBatch to ackFloor belong to openConsumer and fetch, which don't run at
// the same time.
type lane struct {
	config   jetstream.ConsumerConfig
	redrive  string        // the subject of redriven dead letters, besides the one in config; "" for none
	maxBatch int64         // messages that may be asked for at once; 0 until the consumer was first opened
	expiry   time.Duration // of a pull request that waits for messages
	ackWait  time.Duration // of the consumer
	ackFloor uint64        // all messages up to this stream sequence are acknowledged
	parked   atomic.Bool   // whether the consumer was empty, and is asked for its next message only
	pending  int64         // messages that waited when the server was asked last
}

func newLane(consumer, subject string) *lane {
	return &lane{config: jetstream.ConsumerConfig{
		Durable: consumer, FilterSubjects: []string{subject}, DeliverPolicy: jetstream.DeliverAllPolicy,
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: 10 * time.Second, MaxAckPending: maxAckPending, MaxWaiting: maxWaiting,
		MaxDeliver: -1, // attempts are counted here, so that the last one leads to a dead letter
	}}
}

func newFeed(e *endpoint, cfg *handlerConfig, stream jetstream.StreamConfig, lanes ...*lane) *feed {
	return &feed{endpoint: e, cfg: cfg, stream: stream, lanes: lanes, wake: make(chan struct{}, 1), cancel: func() {}}
}

// open makes the consumers, and the stream for dead letters, and starts fetch.
func (f *feed) open(ctx context.Context) error {
	if failure := f.openConsumers(ctx); failure != nil {
		return failure
	}
	if _, failure := f.svc.openStream(ctx, f.svc.deadStream(), f.letters()); failure != nil {
		return failure
	}
	for _, l := range f.lanes { // the caller of open calls checkDenials afterwards
		f.svc.probePublish("$JS.API.CONSUMER.MSG.NEXT."+f.stream.Name+"."+l.config.Durable, "$JS.ACK."+f.stream.Name+"."+l.config.Durable)
	}
	f.svc.probePublish(f.letters())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drained {
		return f.svc.closedError()
	}
	ctx, f.cancel = context.WithCancel(f.svc.base)
	f.fetching.Go(func() { f.fetch(ctx) })
	f.goHelper(f.keepAlive)
	return nil
}

// share begins or ends asking for messages. Those that were asked for already still come.
func (f *feed) share(on bool) error {
	if f.active.Swap(on) != on {
		signal(f.wake)
	}
	return nil
}

// openConsumers makes the consumers that do not exist. Of the others it learns the settings, which the operator may have
// changed.
func (f *feed) openConsumers(ctx context.Context) *Error {
	var subjects []string
	for _, l := range f.lanes {
		subjects = append(subjects, l.config.FilterSubjects[0])
	}
	stream, failure := f.svc.openStream(ctx, f.stream, subjects...)
	for _, l := range f.lanes {
		if failure == nil {
			failure = f.svc.patiently(ctx, func(ctx context.Context) *Error { return f.openConsumer(ctx, stream, l) })
		}
	}
	if failure == nil {
		f.ackWait.Store(int64(slices.MinFunc(f.lanes, func(a, b *lane) int { return cmp.Compare(a.ackWait, b.ackWait) }).ackWait))
	}
	return failure
}

// openConsumer makes the consumer of one lane, or learns its settings. It changes a consumer that exists only if that does not
// keep the order as the handler's Concurrency wants it, or lacks the subject of redriven dead letters.
func (f *feed) openConsumer(ctx context.Context, stream jetstream.Stream, l *lane) *Error {
	begin, config := clock(), l.config
	subject := config.FilterSubjects[0]
	if l.redrive != "" && takes(stream, l.redrive) && !covers(subject, l.redrive) {
		config.FilterSubjects = append(slices.Clone(config.FilterSubjects), l.redrive)
	}
	what := "the consumer " + config.Durable + " of " + f.stream.Name
	c := f.svc.pick()
	if c == nil {
		return f.svc.disconnectedError()
	}
	consumer, err := c.js.Consumer(ctx, f.stream.Name, config.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if l.maxBatch > 0 { // it was opened before, and somebody has deleted it
			if stream.CachedInfo().State.LastSeq < l.ackFloor {
				l.ackFloor = 0 // the stream is a new one
			}
			f.svc.log.Warn("the consumer was deleted and is made again", "endpoint", f.name, "consumer", config.Durable, "after", l.ackFloor)
			if f.stream.Retention == jetstream.LimitsPolicy {
				config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, l.ackFloor+1
			}
		}
		if consumer, err = c.js.CreateConsumer(ctx, f.stream.Name, config); errors.Is(err, jetstream.ErrConsumerExists) {
			// Another instance was faster.
			consumer, err = c.js.Consumer(ctx, f.stream.Name, config.Durable)
		}
	}
	if err != nil {
		return f.svc.jetStreamError(begin, err, what)
	}
	have := consumer.CachedInfo().Config
	filters := append(have.FilterSubjects, have.FilterSubject)
	if !slices.Contains(filters, subject) || have.AckPolicy != jetstream.AckExplicitPolicy || have.MaxDeliver > 0 {
		return notRun(newError(ErrInvalid, "%s, which exists, is not one for %s with explicit acknowledgement and max_deliver -1: delete it, or choose another name by Durable", what, subject))
	}
	ordered, redriven := config.MaxAckPending == 1, slices.ContainsFunc(filters, func(p string) bool { return covers(p, l.redrive) })
	if ordered != (have.MaxAckPending == 1) || len(config.FilterSubjects) > 1 && !redriven {
		have.MaxAckPending, have.FilterSubject, have.FilterSubjects = config.MaxAckPending, "", config.FilterSubjects
		if _, err := c.js.UpdateConsumer(ctx, f.stream.Name, have); err != nil {
			return f.svc.jetStreamError(begin, err, what)
		}
	}
	l.ackFloor, l.ackWait = consumer.CachedInfo().AckFloor.Stream, have.AckWait
	l.maxBatch = int64(min(f.limit, cmp.Or(have.MaxRequestBatch, f.limit))) // 0 in the configuration means no limit
	l.expiry = min(fetchExpiry, cmp.Or(have.MaxRequestExpires, fetchExpiry))
	return nil
}

// fetch asks for messages until ctx ends. It waits for wake when it may not ask, and when all lanes are parked. After a
// failure, and at each checkInterval, it checks the consumers.
func (f *feed) fetch(ctx context.Context) {
	looked, trouble := clock(), 0
	for ctx.Err() == nil {
		free := int64(f.limit) - f.claimed.Load()
		more := f.active.Load() && free > 0
		if more && f.worthAsking(free) {
			more = f.ask(ctx, free)
		} else if more {
			sleep(ctx, time.Millisecond) // then worthAsking may report true
		}
		failed := f.failed.Swap(false)
		if failed {
			trouble++
			sleep(ctx, backoff(trouble, fetchTick, 2*time.Second))
		} else {
			trouble = 0
		}
		if (failed || clock()-looked > checkInterval) && f.svc.pick() != nil {
			within, cancel := context.WithTimeout(ctx, 5*time.Second)
			if failure := f.openConsumers(within); failure != nil && ctx.Err() == nil {
				f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", failure)
			}
			cancel()
			looked = clock()
		}
		if !more && !failed {
			select {
			case <-f.wake:
			case <-ctx.Done():
			}
		}
	}
}

// worthAsking reports whether to ask for more, if free is the number of messages that may be asked for. As long as messages
// wait in the queue, fetch does not ask for single ones, but for an eighth of the limit or more.
func (f *feed) worthAsking(free int64) bool {
	return free > 0 && (free >= int64(f.limit)/8 || len(f.queue) == 0)
}

// ask asks for up to free messages, and reports whether more may be there at once. A single lane is asked for what is there and
// for what comes before the request expires. Of several lanes, the most urgent first, each is asked only for what is there now,
// until one has something. A lane that has nothing is parked: a request for its next message waits there. After 15 messages the
// lanes are asked once in reverse order, so that one start in 16 goes to the least urgent and nothing waits forever.
func (f *feed) ask(ctx context.Context, free int64) bool {
	bring := func(l *lane, n int64, expiry time.Duration) (came int) {
		f.pullFrom(ctx, l, min(n, l.maxBatch), expiry, func(m *nats.Msg) {
			came++
			f.queue <- m
		})
		f.claimed.Add(int64(came) - n)
		return came
	}
	if len(f.lanes) == 1 {
		bring(f.lanes[0], f.claim(free), f.lanes[0].expiry)
		return true
	}
	lanes, reverse := slices.All(f.lanes), f.starts >= 15
	if reverse {
		lanes, free = slices.Backward(f.lanes), max(free/16, 1)
	}
	for _, l := range lanes {
		if l.parked.Load() {
			continue
		}
		n := f.claim(free)
		if n == 0 { // a command from a parked lane has taken the place
			return false
		}
		if came := bring(l, n, 0); came > 0 {
			if f.starts += came; reverse {
				f.starts = 0
			}
			return true
		}
		l.parked.Store(true)
		expiry, begin := l.expiry, clock()
		f.fetching.Go(func() {
			f.pullFrom(ctx, l, 1, expiry, func(m *nats.Msg) { f.accept(l, m, begin) })
			l.parked.Store(false)
			signal(f.wake)
		})
	}
	f.starts = 0
	return false
}

// accept takes a command from a parked lane. The command does not count in claimed yet. accept gives it back if there is no
// room for it, or if something more urgent may be waiting, because a more urgent lane is not parked any more. m was asked for
// at the time begin: if that is longer ago than the ack wait, m may have been delivered to another instance since, which a nak
// would disturb.
func (f *feed) accept(from *lane, m *nats.Msg, begin time.Duration) {
	urgent := slices.ContainsFunc(f.lanes[:slices.Index(f.lanes, from)], func(l *lane) bool { return !l.parked.Load() })
	if !urgent && f.claim(1) == 1 {
		f.queue <- m
	} else if clock()-begin < time.Duration(f.ackWait.Load()) {
		f.acknowledge(m, nak)
	}
}

// claim adds up to n to claimed, as many as the limit allows, and returns how many.
func (f *feed) claim(n int64) int64 {
	for {
		claimed := f.claimed.Load()
		if n = max(min(n, int64(f.limit)-claimed), 0); f.claimed.CompareAndSwap(claimed, claimed+n) {
			return n
		}
	}
}

// pullFrom asks a lane for up to n messages, and passes them to take: those that are there and those that come before expiry is
// over or, if expiry is 0, only those that are there now. It returns when no more will come.
func (f *feed) pullFrom(ctx context.Context, l *lane, n int64, expiry time.Duration, take func(*nats.Msg)) {
	c := f.svc.pick()
	if c == nil {
		f.failed.Store(true)
		return
	}
	drops, end := c.drops.Load(), clock()+fetchExpiry+fetchSlack
	msgs := make(chan *nats.Msg, n+1)
	sub, err := c.nc.ChanSubscribe(c.newInbox(), msgs)
	if err == nil {
		defer func() { _ = sub.Unsubscribe() }() // fails only on a closed connection
		data := fmt.Appendf(nil, `{"batch":%d,"expires":%d,"no_wait":%t}`, n, expiry, expiry == 0)
		err = c.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+f.stream.Name+"."+l.config.Durable, sub.Subject, data)
	}
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	f.requests.Add(1)
	defer f.requests.Add(-1)
	drain, drained := ctx.Done(), false
	for err == nil && n > 0 && !drained {
		select {
		case m := <-msgs:
			switch status := m.Header.Get("Status"); {
			case m.Reply != "" || status == "":
				n--
				take(m)
			case status == "404", status == "408", m.Header.Get("Nats-Pending-Messages") != "":
				return // there are no more messages, or the request has expired
			default:
				err = errors.New(status + " " + m.Header.Get("Description"))
				f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", err)
			}
		case <-tick.C:
			if c.drops.Load() != drops || clock() > end { // a request may also be lost while the connection is up
				err = nats.ErrDisconnected
			}
		case <-drain:
			// In a cluster, servers farther away go on sending for a moment after an unsubscribe, and each event lost by that
			// would use up an attempt. So there the loop goes on until the request expires.
			drain, drained = nil, c.nc.ConnectedClusterName() == ""
		}
	}
	if n == 0 {
		return
	}
	// The request has not come to its end, but what is under way can still be had.
	_ = sub.Drain()                   // sub is nil, or the connection closed, if that fails
	_ = c.flush(context.Background()) // fails at once if the connection is down
	for len(msgs) > 0 {
		if m := <-msgs; m.Reply != "" {
			take(m)
		}
	}
	if err != nil {
		f.failed.Store(true)
	}
}

// drain asks for no more messages, and waits until those that were asked for have come or will not come.
func (f *feed) drain(context.Context) {
	f.mu.Lock()
	f.drained = true
	f.cancel()
	f.mu.Unlock()
	f.fetching.Wait()
}

// release subtracts a message that has been handled from claimed, and wakes fetch if it is worth asking for more.
func (f *feed) release() {
	if f.worthAsking(int64(f.limit) - f.claimed.Add(-1)) {
		signal(f.wake)
	}
}

// acknowledge reports to the server how the delivery of m has ended: ack, nak, and so on. If the acknowledgement is lost, the
// message is redelivered after its ack wait.
func (f *feed) acknowledge(m *nats.Msg, how string) { f.svc.notify(m.Reply, []byte(how)) }

// nakAfter returns the acknowledgement that makes the server redeliver a message after a pause.
func nakAfter(pause time.Duration) string {
	return nak + ` {"delay":` + strconv.FormatInt(int64(pause), 10) + "}"
}

// giveBack returns a message to the server because this instance is not to handle it now. As long as a request of this instance
// may bring the message right back, it is redelivered after fetchExpiry only.
func (f *feed) giveBack(m *nats.Msg) {
	how := nak
	if f.requests.Load() > 0 {
		how = nakAfter(fetchExpiry)
	}
	f.acknowledge(m, how)
}

// keepAlive extends the ack wait of messages that take long to handle, so that the server does not redeliver them before their
// deadline. It returns when the endpoint is finished. Then it deletes the consumer of a Broadcast subscription without WithID,
// because no other instance will ever use that.
func (f *feed) keepAlive() {
	for {
		third := time.Duration(f.ackWait.Load()) / 3
		select {
		case <-time.After(third):
		case <-f.finished:
			if f.cfg.broadcast && f.svc.cfg.id == nil { // if this is lost, the server does it after an hour
				f.svc.notify("$JS.API.CONSUMER.DELETE."+f.stream.Name+"."+f.lanes[0].config.Durable, nil)
			}
			return
		}
		for _, m := range f.handling(third/2, f.cfg.deadline+third) {
			f.acknowledge(m, ackInProgress)
		}
		if f.inspect != nil {
			f.inspect()
		}
	}
}

// pending returns how many messages the consumers had when the server was asked last, which it does at most once a second.
func (f *feed) pending() (n int64) {
	f.counting.Lock()
	defer f.counting.Unlock()
	if c := f.svc.pick(); c != nil && (f.counted == 0 || clock()-f.counted > pendingAge) {
		ctx, cancel := context.WithTimeout(f.svc.base, pendingTimeout)
		defer cancel()
		for _, l := range f.lanes {
			if consumer, err := c.js.Consumer(ctx, f.stream.Name, l.config.Durable); err == nil {
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

// A delivery is what is known about a stored message besides its id and its payload.
type delivery struct {
	consumer string
	time     time.Time // when the message was first stored
	sequence uint64    // in the stream
	attempt  int       // 1 for the first delivery
}

// newRequest returns the request for a message that has arrived, or nil if the message is not one for this feed.
func (f *feed) newRequest(m *nats.Msg, arrived time.Time) *request {
	meta, err := m.Metadata()
	id := m.Header.Get(headerID)
	if err != nil || meta.Stream != f.stream.Name || f.kind == kindCommand && id == "" ||
		!slices.ContainsFunc(f.lanes, func(l *lane) bool { return l.config.Durable == meta.Consumer }) {
		f.svc.log.Warn("dropped a message that is no "+f.kind,
			"endpoint", f.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		return nil
	}
	d := &delivery{consumer: meta.Consumer, time: meta.Timestamp, sequence: meta.Sequence.Stream, attempt: int(meta.NumDelivered)}
	r := &request{svc: f.svc, in: m, deadline: arrived.Add(f.cfg.deadline), delivery: d}
	r.msg = Message{Kind: f.kind, Subject: m.Subject, Header: m.Header, Data: m.Data}
	if strings.HasPrefix(m.Subject, redrivePrefix) { // the headers say where the message came from
		r.msg.Subject = m.Header.Get(headerSubject)
		if t, err := time.Parse(time.RFC3339Nano, m.Header.Get(headerTime)); err == nil {
			d.time = t
		}
	} else if f.kind == kindEvent {
		id = m.Header.Get(jetstream.MsgIDHeader)
	}
	if f.kind == kindEvent {
		// Publish puts <domain>.<type>: before an idempotency key, because events of other types may have the same key.
		id = cmp.Or(strings.TrimPrefix(id, strings.TrimPrefix(r.msg.Subject, eventPrefix)+":"), strconv.FormatUint(d.sequence, 10))
	}
	r.id = id
	if name := m.Header.Get(headerSource); isName(name, maxService) {
		r.msg.Source = name
	}
	return r
}
