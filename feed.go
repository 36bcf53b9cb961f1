package aegis

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the feed, which brings stored messages to an endpoint: it makes the consumers, asks them for messages, keeps what
// is being handled from being redelivered, and acknowledges.

const (
	maxAckPending = 1 << 16 // messages of a consumer that are being handled, or wait for their next attempt
	maxWaiting    = 1 << 12 // requests to a consumer, from all instances

	fetchTick    = 250 * time.Millisecond // between looks at the connection
	fetchExpiry  = time.Second            // of a request
	fetchSlack   = time.Second            // for the server to report that it has expired
	fetchSession = 15 * time.Second       // after which the consumers are looked at again

	pendingTimeout = 250 * time.Millisecond
	pendingAge     = time.Second // after which the server is asked again

	tolerance = 3 // deliveries beyond Attempts that may have ended without a result
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
	cfg     *handlerConfig
	stream  jetstream.StreamConfig // to be made if there is none
	lanes   []*lane                // the most urgent first
	claimed atomic.Int64           // messages asked for, waiting in the queue, or being handled
	starts  int                    // messages brought since a lane was asked out of turn, or all lanes were empty
	ackWait atomic.Int64           // the shortest of all consumers
	active  atomic.Bool            // see share
	failed  atomic.Bool            // a request has failed
	wake    chan struct{}          // tells fetch that it can ask for more, or that active has changed
	inspect func()                 // called at intervals while messages may be handled, unless it is nil

	counting sync.Mutex    // guards counted, and pending of the lanes
	counted  time.Duration // when the server was asked for that

	fetching sync.WaitGroup     // fetch, and the requests to parked lanes
	mu       sync.Mutex         // guards the rest
	drained  bool               // drain was called
	cancel   context.CancelFunc // ends fetch
}

// A lane is one of a feed's consumers. The fields from most to floor belong to openConsumer and fetch.
type lane struct {
	config  jetstream.ConsumerConfig
	redrive string // a subject besides the one in config, "" for none
	opened  bool   // the consumer exists, or did
	most    int64  // messages that may be asked for at once
	expiry  time.Duration
	floor   uint64      // all messages up to this sequence are finished
	parked  atomic.Bool // the consumer was found empty, and was asked for its next message
	pending int64       // messages that wait, as far as is known
}

func newLane(consumer, subject string) *lane {
	return &lane{config: jetstream.ConsumerConfig{
		Durable:        consumer,
		FilterSubjects: []string{subject},
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        10 * time.Second,
		MaxDeliver:     -1, // attempts are counted here, so that the last one leads to a dead letter
		MaxAckPending:  maxAckPending,
		MaxWaiting:     maxWaiting,
	}}
}

func newFeed(e *endpoint, cfg *handlerConfig, stream jetstream.StreamConfig, lanes ...*lane) *feed {
	return &feed{endpoint: e, cfg: cfg, stream: stream, lanes: lanes, wake: make(chan struct{}, 1)}
}

// open makes the consumers and begins to fetch.
func (f *feed) open(ctx context.Context) error {
	failure := f.svc.patiently(ctx, func(ctx context.Context) *Error {
		failure := f.openConsumers(ctx)
		if failure == nil {
			_, failure = f.svc.openStream(ctx, f.svc.deadStream(), f.letters())
		}
		return failure
	})
	if failure != nil {
		return failure
	}
	for _, l := range f.lanes {
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
	f.helpers.Go(f.keepAlive)
	return nil
}

// share begins or ends the asking. What was asked for already still comes.
func (f *feed) share(on bool) error {
	if f.active.Swap(on) != on {
		signal(f.wake)
	}
	return nil
}

// openConsumers makes the consumers that do not exist, and learns what the operator may have changed in the others.
func (f *feed) openConsumers(ctx context.Context) *Error {
	var shortest time.Duration
	for _, l := range f.lanes {
		stream, failure := f.svc.openStream(ctx, f.stream, l.config.FilterSubjects[0])
		if failure != nil {
			return failure
		}
		ackWait, failure := f.openConsumer(ctx, stream, l)
		if failure != nil {
			return failure
		}
		shortest = min(ackWait, cmp.Or(shortest, ackWait))
	}
	f.ackWait.Store(int64(shortest))
	return nil
}

func (f *feed) openConsumer(ctx context.Context, stream jetstream.Stream, l *lane) (ackWait time.Duration, failure *Error) {
	begin, config := clock(), l.config
	subject := config.FilterSubjects[0]
	if l.redrive != "" && takes(stream, l.redrive) && !covers(subject, l.redrive) {
		config.FilterSubjects = append(slices.Clone(config.FilterSubjects), l.redrive)
	}
	what := "the consumer " + config.Durable + " of " + f.stream.Name
	consumer, err := stream.Consumer(ctx, config.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if l.opened { // somebody has deleted it
			if stream.CachedInfo().State.LastSeq < l.floor { // together with the stream
				l.floor = 0
			}
			f.svc.log.Warn("the consumer was deleted and is made again", "endpoint", f.name, "consumer", config.Durable, "after", l.floor)
			if f.stream.Retention == jetstream.LimitsPolicy {
				config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, l.floor+1
			}
		}
		if consumer, err = stream.CreateConsumer(ctx, config); errors.Is(err, jetstream.ErrConsumerExists) { // another instance was faster
			consumer, err = stream.Consumer(ctx, config.Durable)
		}
	}
	if err != nil {
		return 0, f.svc.jetStreamError(begin, err, what)
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
			return 0, f.svc.jetStreamError(begin, err, what)
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
	l.opened = true
	return have.AckWait, nil
}

// fetch asks for messages until ctx ends.
func (f *feed) fetch(ctx context.Context) {
	looked, trouble := clock(), 0
	for ctx.Err() == nil {
		free := int64(f.limit) - f.claimed.Load()
		more := f.active.Load() && free > 0
		if more && f.worthAsking(free) {
			more = f.ask(ctx, free)
		} else if more {
			sleep(ctx, time.Millisecond) // until more is free, or the queue is empty
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

// worthAsking reports whether to ask for more: not for each single message as long as others wait to be handled.
func (f *feed) worthAsking(free int64) bool {
	return free > 0 && (free >= int64(f.limit)/8 || len(f.queue) == 0)
}

// ask asks for what can be handled, and reports whether there may be more at once. With several lanes it asks each for what is
// there now, the most urgent first, until one has something; those that are empty are parked. One start in 16 goes to the other
// end, so that nothing waits forever.
func (f *feed) ask(ctx context.Context, free int64) bool {
	bring := func(l *lane, now bool) (came int) {
		f.claimed.Add(free)
		f.request(ctx, l, l.pull(free, now), func(m *nats.Msg) {
			came++
			f.queue <- m
		})
		f.claimed.Add(int64(came) - free)
		return came
	}
	if len(f.lanes) == 1 {
		bring(f.lanes[0], false)
		return true
	}
	lanes, reverse := f.lanes, f.starts >= 15
	if reverse {
		lanes = slices.Clone(lanes)
		slices.Reverse(lanes)
		free = max(free/16, 1)
	}
	for _, l := range lanes {
		if l.parked.Load() {
			continue
		}
		if came := bring(l, true); came > 0 {
			if f.starts += came; reverse {
				f.starts = 0
			}
			return true
		}
		l.parked.Store(true)
		next := l.pull(1, false)
		f.fetching.Go(func() {
			f.request(ctx, l, next, func(m *nats.Msg) { f.accept(l, m) })
			l.parked.Store(false)
			signal(f.wake)
		})
	}
	f.starts = 0
	return false
}

// accept takes a command from a parked lane, which is not claimed yet. It gives it back if there is no room for it, or if
// something more urgent may be waiting.
func (f *feed) accept(from *lane, m *nats.Msg) {
	urgent := slices.ContainsFunc(f.lanes[:slices.Index(f.lanes, from)], func(l *lane) bool { return !l.parked.Load() })
	if f.claimed.Add(1) > int64(f.limit) || urgent {
		f.acknowledge(m, nak)
		f.release()
		return
	}
	f.queue <- m
}

// A pullRequest asks a consumer for messages: with NoWait for those that are there now, else also for those that come before it
// expires.
type pullRequest struct {
	Batch   int64         `json:"batch"`
	Expires time.Duration `json:"expires,omitempty"`
	NoWait  bool          `json:"no_wait,omitempty"`
}

// pull returns the request for up to n messages of a lane.
func (l *lane) pull(n int64, now bool) pullRequest {
	ask := pullRequest{Batch: min(n, l.most), NoWait: now}
	if !now {
		ask.Expires = l.expiry
	}
	return ask
}

// request asks a lane for messages, and passes them to take until no more will come.
func (f *feed) request(ctx context.Context, l *lane, ask pullRequest, take func(*nats.Msg)) {
	data, _ := json.Marshal(ask) // numbers can't fail
	c := f.svc.pick()
	if c == nil {
		f.failed.Store(true)
		return
	}
	drops, end := c.drops.Load(), clock()+fetchExpiry+fetchSlack
	msgs := make(chan *nats.Msg, ask.Batch+1)
	sub, err := c.nc.ChanSubscribe(c.newInbox(), msgs)
	if err == nil {
		defer func() { _ = sub.Unsubscribe() }() // fails only on a closed connection
		err = c.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+f.stream.Name+"."+l.config.Durable, sub.Subject, data)
	}
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	drain := ctx.Done()
	for n := ask.Batch; err == nil && n > 0; {
		select {
		case m := <-msgs:
			switch status := m.Header.Get("Status"); {
			case m.Reply != "" || status == "":
				n--
				take(m)
			case status == "404", status == "408", m.Header.Get("Nats-Pending-Messages") != "": // no more messages, or it has expired
				return
			default:
				err = errors.New(status + " " + m.Header.Get("Description"))
				f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", err)
			}
		case <-tick.C:
			if c.drops.Load() != drops || clock() > end { // not every request that is lost is reported
				err = nats.ErrDisconnected
			}
		case <-drain:
			// In a cluster, servers farther away go on sending for a moment after an unsubscribe, and each event lost by that
			// would use up an attempt. So the request has to expire there.
			if drain = nil; c.nc.ConnectedClusterName() == "" {
				_ = sub.Drain() // fails only on a closed connection
				_ = c.flush(f.svc.base)
				for len(msgs) > 0 {
					if m := <-msgs; m.Reply != "" {
						take(m)
					}
				}
				return
			}
		}
	}
	if err != nil {
		f.failed.Store(true)
	}
}

// drain asks for no more, and waits until what was asked for has come or will not come.
func (f *feed) drain(context.Context) {
	f.mu.Lock()
	f.drained = true
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	f.fetching.Wait()
}

// release frees the place of a message that has been handled.
func (f *feed) release() {
	if f.worthAsking(int64(f.limit) - f.claimed.Add(-1)) {
		signal(f.wake)
	}
}

// acknowledge acknowledges a delivery in one of the ways. If that is lost, the message is delivered again after its ack wait.
func (f *feed) acknowledge(m *nats.Msg, how string) { f.svc.notify(m.Reply, []byte(how)) }

func nakAfter(pause time.Duration) string {
	return nak + ` {"delay":` + strconv.FormatInt(int64(pause), 10) + "}"
}

// giveBack returns a message to the server because this instance is not to handle it now. If another one leads, it waits until
// what this instance has asked for has expired.
func (f *feed) giveBack(m *nats.Msg) {
	how := nak
	if f.lease != nil && f.svc.quitting.Err() == nil {
		how = nakAfter(fetchExpiry)
	}
	f.acknowledge(m, how)
}

// retry has a message delivered again after a pause.
func (f *feed) retry(r *request, failure *Error) {
	pause := backoff(r.delivery.attempt, f.cfg.backoff, f.cfg.maxPause)
	f.logger(r).Warn("an attempt failed", "error", failure, "attempt", r.delivery.attempt, "pause", pause)
	f.acknowledge(r.in, nakAfter(pause))
}

// keepAlive extends the ack wait of messages whose handling takes long, until their deadline, lest the server deliver them again.
// At the end it removes a consumer that nobody will come back to.
func (f *feed) keepAlive() {
	for {
		third := time.Duration(f.ackWait.Load()) / 3
		select {
		case <-time.After(third):
		case <-f.finished:
			if f.cfg.broadcast && f.svc.cfg.id == nil { // if this is denied or lost, the server does it an hour later
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

// A delivery is what is known about a stored message besides its payload.
type delivery struct {
	id       string
	subject  string // the original one
	consumer string
	time     time.Time
	sequence uint64
	attempt  int
}

// delivery reads what the server says about m. It returns nil if m is not a message for this feed.
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

// retryUntilStopped tries until it succeeds. It reports false if Stop's time is up before. The message stays with this instance
// meanwhile.
func (f *feed) retryUntilStopped(r *request, problem string, try func(ctx context.Context) *Error) bool {
	for n := 1; ; n++ {
		ctx, cancel := context.WithTimeout(f.svc.base, 5*time.Second)
		failure := try(ctx)
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
