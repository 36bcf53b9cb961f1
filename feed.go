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

// This file has the feed, which brings stored messages to an endpoint: it makes the consumers, asks them for messages, keeps what is
// being handled from being redelivered, and acknowledges.

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

// A feed is a source that brings an endpoint the messages of pull consumers of a stream. It asks for as many messages as can be handled
// at once and no more, so that what was delivered is being handled, and the rest waits in the server.
type feed struct {
	*endpoint
	cfg     *handlerConfig
	stream  jetstream.StreamConfig // to be made if there is none
	lanes   []*lane                // the most urgent first
	claimed atomic.Int64           // messages asked for, waiting in the queue, or being handled
	ackWait atomic.Int64           // the shortest of all consumers
	active  atomic.Bool            // see share
	wake    chan struct{}          // tells fetch that it can ask for more, or that active has changed
	inspect func()                 // called at intervals while messages may be handled, unless it is nil

	fetching sync.WaitGroup     // fetch
	drained  atomic.Bool        // drain was called
	mu       sync.Mutex         // guards cancel, and that fetch does not begin once drained
	cancel   context.CancelFunc // ends fetch

	// The following belong to fetch, and to drain when fetch has ended.
	conn    *conn          // the connection that messages come by, nil if there is none
	drops   uint32         // of it, when the inboxes were made
	inbound chan *nats.Msg // from the lanes' inboxes
	asked   *lane          // the lane that was asked for what can be handled, nil if none is
	came    int            // messages that this request has brought
	reverse bool           // it was asked out of turn
	starts  int            // messages brought since a lane was asked out of turn
	failed  bool           // a request has failed
	trouble int            // how often one failed in a row

	counting sync.Mutex    // guards counted, and pending of the lanes
	counted  time.Duration // when the server was asked for that
}

// A lane is one of a feed's consumers.
type lane struct {
	config  jetstream.ConsumerConfig
	redrive string      // a subject besides the one in config, "" for none
	opened  atomic.Bool // the consumer exists, or did
	most    int64       // messages that may be asked for at once
	expiry  time.Duration
	floor   uint64 // all messages up to this sequence are finished

	// The following belong to fetch, like those of the feed.
	inbox  *nats.Subscription
	owed   int64         // messages asked for that have not come yet
	since  time.Duration // when they were asked for
	parked bool          // the consumer was found empty, and was asked for one message that is not claimed

	pending int64 // messages that wait, as far as is known
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
	return &feed{endpoint: e, cfg: cfg, stream: stream, lanes: lanes, wake: make(chan struct{}, 1),
		inbound: make(chan *nats.Msg, len(lanes)*(cfg.concurrency+64))}
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
		f.svc.probePublish(l.next(f.stream.Name), "$JS.ACK."+f.stream.Name+"."+l.config.Durable)
	}
	f.svc.probePublish(f.letters())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drained.Load() {
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
		if l.opened.Load() { // somebody has deleted it
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
	l.opened.Store(true)
	return have.AckWait, nil
}

// fetch asks for messages and takes what comes, until ctx ends.
func (f *feed) fetch(ctx context.Context) {
	tick := time.NewTicker(fetchTick)
	defer tick.Stop()
	looked := clock()
	for ctx.Err() == nil {
		f.ask()
		if f.failed {
			f.trouble++
			sleep(ctx, backoff(f.trouble, fetchTick, 2*time.Second))
		}
		if (f.failed || clock()-looked > fetchSession) && f.svc.pick() != nil {
			within, cancel := context.WithTimeout(ctx, 5*time.Second)
			if failure := f.openConsumers(within); failure != nil && ctx.Err() == nil {
				f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", failure)
			}
			cancel()
			looked = clock()
		}
		if f.failed {
			f.failed = false
			continue
		}
		select {
		case m := <-f.inbound:
			f.receive(m)
		case <-tick.C:
			f.checkRequests()
		case <-f.wake:
		case <-ctx.Done():
		}
	}
}

// ask asks for what can be handled, one lane at a time. With several lanes it asks each for what is there now, the most urgent first,
// until one has something; those that are empty are parked. One start in 16 goes to the other end, so that nothing waits forever.
func (f *feed) ask() {
	if f.asked != nil || !f.active.Load() {
		return
	}
	free := int64(f.limit) - f.claimed.Load()
	if !f.worthAsking(free) {
		return
	}
	if len(f.lanes) == 1 {
		f.request(f.lanes[0], free, false, false)
		return
	}
	lanes := f.lanes
	if f.reverse = f.starts >= 15; f.reverse {
		lanes = slices.Clone(lanes)
		slices.Reverse(lanes)
		free = max(free/16, 1)
	}
	if i := slices.IndexFunc(lanes, func(l *lane) bool { return !l.parked }); i >= 0 {
		f.request(lanes[i], free, true, false)
	} else {
		f.starts = 0 // all are empty
	}
}

// worthAsking reports whether to ask for more: not for each single message as long as others wait to be handled.
func (f *feed) worthAsking(free int64) bool {
	return free > 0 && (free >= int64(f.limit)/8 || len(f.queue) == 0)
}

// request asks a lane for up to n messages: those that are there now, or also those that come before the request expires. They are
// claimed unless the lane is to be parked.
func (f *feed) request(l *lane, n int64, now, park bool) {
	ask := pullRequest{Batch: min(n, l.most), NoWait: now}
	if !now {
		ask.Expires = l.expiry
	}
	data, _ := json.Marshal(ask) // numbers can't fail
	if !f.listen() {
		f.failed = true
		return
	}
	l.owed, l.since, l.parked = ask.Batch, clock(), park
	if !park {
		f.asked, f.came = l, 0
		f.claimed.Add(l.owed)
	}
	if f.conn.nc.PublishRequest(l.next(f.stream.Name), l.inbox.Subject, data) != nil {
		f.endRequest(l)
		f.failed = true
	}
}

func (l *lane) next(stream string) string {
	return "$JS.API.CONSUMER.MSG.NEXT." + stream + "." + l.config.Durable
}

type pullRequest struct {
	Batch   int64         `json:"batch"`
	Expires time.Duration `json:"expires,omitempty"`
	NoWait  bool          `json:"no_wait,omitempty"`
}

// listen makes the lanes' inboxes, anew if their connection was lost. It reports false if there is no connection.
func (f *feed) listen() bool {
	if f.conn != nil && f.drops == f.conn.drops.Load() {
		return true
	}
	f.hangUp()
	c := f.svc.pick()
	if c == nil {
		return false
	}
	f.drops = c.drops.Load()
	for _, l := range f.lanes {
		var err error
		if l.inbox, err = c.nc.ChanSubscribe(c.newInbox(), f.inbound); err != nil {
			return false
		}
	}
	f.conn = c
	return true
}

// hangUp gives all requests up. What is under way still comes.
func (f *feed) hangUp() {
	for _, l := range f.lanes {
		f.endRequest(l)
		if l.inbox != nil {
			_ = l.inbox.Drain() // fails only on a closed connection
		}
	}
	f.conn = nil
}

// endRequest notes that no more will come for the request to a lane.
func (f *feed) endRequest(l *lane) {
	if l == f.asked {
		f.asked = nil
		f.claimed.Add(-l.owed)
		if f.starts += f.came; f.came > 0 && f.reverse {
			f.starts = 0
		}
	}
	l.owed, l.parked = 0, false
}

// receive takes a message that has come, or learns that a request has ended.
func (f *feed) receive(m *nats.Msg) {
	i := slices.IndexFunc(f.lanes, func(l *lane) bool { return l.inbox == m.Sub })
	status := m.Header.Get("Status")
	if m.Reply != "" || status == "" {
		f.trouble = 0
		if i < 0 || f.lanes[i].owed == 0 { // it belongs to a request that was given up
			f.accept(m, nil)
			return
		}
		l := f.lanes[i]
		l.owed--
		if l == f.asked {
			f.came++
			f.queue <- m // there is room: it was claimed
		} else {
			f.accept(m, l)
		}
		if l.owed == 0 {
			f.endRequest(l)
		}
		return
	}
	if i < 0 || f.lanes[i].owed == 0 {
		return
	}
	l, empty := f.lanes[i], false
	switch {
	case status == "404", status == "408", m.Header.Get("Nats-Pending-Messages") != "": // no more messages, or the request has expired
		f.trouble = 0
		empty = len(f.lanes) > 1 && l == f.asked && f.came == 0 && !f.drained.Load()
	default:
		f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", status+" "+m.Header.Get("Description"))
		f.failed = true
	}
	f.endRequest(l)
	if empty {
		f.request(l, 1, false, true)
	}
}

// accept takes a message that is not claimed yet, from a parked lane or from none. A command is given back if there is no room for it,
// or if something more urgent may be waiting. An event would lose an attempt by that.
func (f *feed) accept(m *nats.Msg, from *lane) {
	urgent := from != nil && slices.ContainsFunc(f.lanes[:slices.Index(f.lanes, from)], func(l *lane) bool { return !l.parked })
	if f.claimed.Add(1) > int64(f.limit) && f.kind == kindCommand || urgent {
		f.acknowledge(m, nak)
		f.release()
		return
	}
	f.queue <- m
}

// checkRequests gives the requests up if their connection was lost or the server does not answer them any more.
func (f *feed) checkRequests() {
	late := func(l *lane) bool { return l.owed > 0 && clock()-l.since > fetchExpiry+fetchSlack } // not every lost request is reported
	if f.conn != nil && (f.conn.drops.Load() != f.drops || slices.ContainsFunc(f.lanes, late)) {
		f.hangUp()
		f.failed = true
	}
}

// drain asks for no more. In a cluster it takes what was asked for until that expires: after an unsubscribe, servers farther away go
// on sending for a moment, and each event lost by that would have used up an attempt.
func (f *feed) drain(ctx context.Context) {
	f.mu.Lock()
	f.drained.Store(true)
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	f.fetching.Wait()
	if c := f.conn; c != nil {
		owed := func(l *lane) bool { return l.owed > 0 }
		cluster, end := c.nc.ConnectedClusterName() != "", clock()+fetchExpiry+fetchSlack
		for cluster && slices.ContainsFunc(f.lanes, owed) && clock() < end && c.up.Load() && ctx.Err() == nil {
			select {
			case m := <-f.inbound:
				f.receive(m)
			case <-time.After(5 * time.Millisecond):
			}
		}
		for _, l := range f.lanes {
			_ = l.inbox.Drain() // fails only on a closed connection
		}
		if c.flush(ctx) != nil {
			for _, l := range f.lanes {
				_ = l.inbox.Unsubscribe() // or it would come back with the connection; fails only on a closed one
			}
		}
	}
	for len(f.inbound) > 0 {
		f.receive(<-f.inbound)
	}
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

// giveBack returns a message to the server because this instance is not to handle it now. If another one leads, it waits until what
// this instance has asked for has expired.
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

// keepAlive extends the ack wait of messages whose handling takes long, until their deadline, lest the server deliver them again. At
// the end it removes a consumer that nobody will come back to.
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
