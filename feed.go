package aegis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
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

	pullSize      = 512                    // messages that are asked for at once
	pullBytes     = 8 << 20                // bytes that all feeds ask for at once; the server cuts a connection at 64 MB
	pullExpiry    = 30 * time.Second       // after which a pull request is made anew
	pullHeartbeat = 5 * time.Second        // between the server's signs of life; a request without one for twice as long is lost
	quietTime     = 50 * time.Millisecond  // without a message, after which a consumer has no more for a request that is given up
	drainTime     = 2 * time.Second        // for messages under way to arrive when a request is given up
	fetchTimeout  = 5 * time.Second        // without a message, after which a request for those that a lane has now has failed
	checkInterval = 15 * time.Second       // after which fetch checks the consumers again
	retryPause    = 250 * time.Millisecond // the first bound of the random pause after a failure
	returnPause   = time.Second            // before a message that is given back may come again, if it is pulled here

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
	cfg          *handlerConfig
	stream       jetstream.StreamConfig // used to make the stream if it does not exist
	lanes        []*lane                // the most urgent first
	reserved     atomic.Int64           // how many messages of the limit were asked for, wait in the queue, or are being handled
	pulls        atomic.Int32           // pull requests that are in flight, or may be about to be made
	sinceReverse int                    // messages brought since the lanes were asked in reverse order, or were all empty
	ackWait      atomic.Int64           // the shortest ack wait of the consumers
	pulling      atomic.Bool            // whether the request to a single lane has more than half of its messages still to come
	maxDelay     atomic.Int64           // for how long the stream can keep a message for later; 0 if it can't
	failed       atomic.Bool            // whether a pull request has failed since fetch looked last
	renewed      atomic.Bool            // whether the connection was lost and is back, since fetch looked last
	wake         chan struct{}          // tells fetch to look whether it can ask for more
	renew        chan struct{}          // tells keepAlive that the connection is back
	inspect      func()                 // called at intervals while messages may be handled, unless it is nil

	counting sync.Mutex    // guards counted, and pending of the lanes
	counted  time.Duration // when the server was last asked for pending, by the clock

	fetching sync.WaitGroup     // counts fetch, and the requests to parked lanes
	mu       sync.Mutex         // guards the rest
	drained  bool               // whether drain was called
	cancel   context.CancelFunc // ends fetch, if that has begun
	active   bool               // whether to ask for messages; see share
	pullCtx  context.Context    // the ctx of the pull requests in flight; nil before the first
	endPulls context.CancelFunc // ends pullCtx
}

// A lane is one of a feed's consumers. The fields from consumer to ackFloor belong to openConsumer and fetch, which don't run at
// the same time.
type lane struct {
	config   jetstream.ConsumerConfig
	again    string // a second pattern of subjects, of events that are redriven or come back by RetryAfter; "" for commands
	consumer jetstream.Consumer
	ackWait  time.Duration // of the consumer
	created  time.Time     // when the stream was made
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
	return &feed{
		endpoint: e, cfg: cfg, stream: stream, lanes: lanes, wake: make(chan struct{}, 1), renew: make(chan struct{}, 1),
		cancel: func() {}, endPulls: func() {},
	}
}

// open makes the consumers, and the stream for dead letters, and starts fetch.
func (f *feed) open(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			f.svc.removeFromCarrier(f)
		}
	}()
	if err = f.svc.addToCarrier(f); err == nil {
		err = f.svc.awaitConnections(ctx, f.svc.carrier.conn.Load())
	}
	if err != nil {
		return err
	}
	if failure := f.openConsumers(ctx); failure != nil {
		return failure
	}
	if _, failure := f.svc.openStream(ctx, f.svc.deadStream(), f.letters()); failure != nil {
		return failure
	}
	for _, l := range f.lanes { // the caller of open calls checkDenials afterwards
		f.svc.probePublish(f.pullSubject(l), "$JS.ACK."+f.stream.Name+"."+l.config.Durable)
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

// share begins or ends asking for messages. Those that are under way still come.
func (f *feed) share(on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.active = on; !on {
		f.endPulls()
	}
	signal(f.wake)
	return nil
}

// beginPull returns the ctx for pull requests, or nil if the feed must not ask for messages now. It counts a pull request, so
// that the feed is busy until the caller subtracts that again.
func (f *feed) beginPull(ctx context.Context) context.Context {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.active {
		return nil
	}
	if f.pullCtx == nil || f.pullCtx.Err() != nil {
		f.pullCtx, f.endPulls = context.WithCancel(ctx)
	}
	f.pulls.Add(1)
	return f.pullCtx
}

// openConsumers makes the consumers that do not exist, and learns what matters about the others.
func (f *feed) openConsumers(ctx context.Context) *Error {
	var subjects []string
	for _, l := range f.lanes {
		subjects = append(subjects, l.config.FilterSubjects[0])
	}
	stream, failure := f.svc.openStream(ctx, f.stream, subjects...)
	for _, l := range f.lanes {
		if failure == nil {
			failure = f.svc.retryTimeouts(ctx, func(ctx context.Context) *Error { return f.openConsumer(ctx, stream, l) })
		}
	}
	if failure == nil {
		f.maxDelay.Store(int64(scheduleLimit(stream)))
		f.ackWait.Store(int64(slices.MinFunc(f.lanes, func(a, b *lane) int { return cmp.Compare(a.ackWait, b.ackWait) }).ackWait))
	}
	return failure
}

// openConsumer makes the consumer of one lane. When it is first opened, one that exists gets the configuration that the code
// wants. Only its ack wait, whether it is paused, and how it is stored, are left to the operator.
func (f *feed) openConsumer(ctx context.Context, stream jetstream.Stream, l *lane) *Error {
	begin, config := clock(), l.config
	if l.again != "" && takes(stream, l.again) && !covers(config.FilterSubjects[0], l.again) {
		config.FilterSubjects = append(slices.Clone(config.FilterSubjects), l.again)
	}
	what := "the consumer " + config.Durable + " of " + f.stream.Name
	c := f.svc.carrier.conn.Load()
	if !c.up.Load() {
		return f.svc.disconnectedError()
	}
	consumer, err := c.js.Consumer(ctx, f.stream.Name, config.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if l.consumer != nil { // somebody has deleted it, perhaps with the stream
			if created := stream.CachedInfo().Created; !created.Equal(l.created) {
				l.ackFloor = 0 // the stream is a new one
			}
			f.svc.log.Warn("the consumer was deleted and is made again",
				"endpoint", f.name, "consumer", config.Durable, "after", l.ackFloor)
			if f.stream.Retention == jetstream.LimitsPolicy {
				config.DeliverPolicy, config.OptStartSeq = jetstream.DeliverByStartSequencePolicy, l.ackFloor+1
			}
		}
		if consumer, err = c.js.CreateConsumer(ctx, f.stream.Name, config); errors.Is(err, jetstream.ErrConsumerExists) {
			// Another instance was faster.
			consumer, err = c.js.Consumer(ctx, f.stream.Name, config.Durable)
		}
	}
	if err == nil && l.consumer == nil { // later, another version of the service may want another configuration
		have := consumer.CachedInfo().Config
		if have.FilterSubject != "" {
			have.FilterSubject, have.FilterSubjects = "", []string{have.FilterSubject}
		}
		if !slices.Contains(have.FilterSubjects, config.FilterSubjects[0]) || have.AckPolicy != config.AckPolicy ||
			have.DeliverSubject != "" {
			return notRun(newError(ErrInvalid, "%s, which exists, is not a pull consumer for %s with explicit acknowledgement: "+
				"delete it, or choose another name by Durable", what, config.FilterSubjects[0]))
		}
		want := have
		want.FilterSubjects, want.BackOff = config.FilterSubjects, nil
		want.MaxDeliver, want.MaxAckPending, want.InactiveThreshold = config.MaxDeliver, config.MaxAckPending, config.InactiveThreshold
		want.MaxRequestBatch, want.MaxRequestExpires, want.MaxRequestMaxBytes = 0, 0, 0
		if !reflect.DeepEqual(have, want) {
			consumer, err = c.js.UpdateConsumer(ctx, f.stream.Name, want)
		}
	}
	if err != nil {
		return f.svc.jetStreamError(begin, err, what)
	}
	info := consumer.CachedInfo()
	l.consumer, l.ackWait, l.ackFloor, l.created = consumer, info.Config.AckWait, info.AckFloor.Stream, stream.CachedInfo().Created
	return nil
}

// learnFloors learns how far the consumers have come. It reports false if one of them can't be asked.
func (f *feed) learnFloors(ctx context.Context) bool {
	for _, l := range f.lanes {
		info, err := l.consumer.Info(ctx)
		if err != nil {
			return false
		}
		l.ackFloor = info.AckFloor.Stream
	}
	return true
}

// fetch asks for messages until ctx ends. After a failure, after a reconnect, and at each checkInterval, it checks the consumers.
func (f *feed) fetch(ctx context.Context) {
	checked, trouble := clock(), 0
	for ctx.Err() == nil {
		failed := f.failed.Swap(false)
		if failed {
			trouble++
			// At once, the server might still be deleting what is to be made again.
			sleep(ctx, retryPause+backoff(trouble, retryPause, 2*time.Second))
		}
		if renewed := f.renewed.Swap(false); failed || renewed || clock()-checked > checkInterval {
			within, cancel := context.WithTimeout(ctx, 5*time.Second)
			var failure *Error
			if failed || renewed || !f.learnFloors(within) {
				failure = f.openConsumers(within)
			}
			cancel()
			if failure != nil {
				if ctx.Err() == nil && f.svc.carrier.conn.Load().up.Load() {
					f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", failure)
				}
				f.failed.Store(true)
				continue
			}
			if checked = clock(); !failed {
				trouble = 0
			}
		}
		if f.askIfFree(ctx) {
			continue
		}
		select {
		case <-f.wake:
		case <-ctx.Done():
		case <-time.After(checkInterval):
		}
	}
}

// askIfFree asks for messages if there is room for them. It reports whether it is to be called again at once.
func (f *feed) askIfFree(ctx context.Context) bool {
	asking := f.beginPull(ctx)
	if asking == nil {
		return false
	}
	defer f.pulls.Add(-1)
	free := int64(f.limit) - f.reserved.Load()
	switch {
	case free <= 0 || f.pulling.Load():
		return false
	case !f.worthAsking(free):
		sleep(ctx, time.Millisecond) // then worthAsking may report true
		return true
	case len(f.lanes) == 1:
		f.askOne(asking, free)
		return false
	}
	return f.askByPriority(asking, free)
}

// worthAsking reports whether to ask for more, if free is the number of messages that may be asked for. As long as messages
// wait in the queue, fetch does not ask for single ones, but for an eighth of the limit or more.
func (f *feed) worthAsking(free int64) bool {
	return free > 0 && (free >= int64(f.limit)/8 || len(f.queue) == 0)
}

// askOne asks the only lane for up to free messages, those that it has and those that come until ctx ends. When half of them have
// come, fetch may ask again.
func (f *feed) askOne(ctx context.Context, free int64) {
	n := f.reserve(min(free, pullSize))
	consumer := f.lanes[0].consumer
	f.pulling.Store(true)
	askAgain := sync.OnceFunc(func() {
		f.pulling.Store(false)
		signal(f.wake)
	})
	f.goPull(func() {
		left := n
		f.await(ctx, consumer, func(m jetstream.Msg) bool {
			f.queue <- boundMsg(m)
			if left--; left <= n/2 {
				askAgain()
			}
			return true
		}, jetstream.StopAfter(n), jetstream.PullMaxMessagesWithBytesLimit(int(n), int(f.svc.pullBytes())))
		f.reserved.Add(-left)
		askAgain()
	})
}

// askByPriority asks each lane for what it has now, the most urgent first, until one has something. It reports whether one had.
// A lane that has nothing is parked: a request for its next message waits at the server. After every 15 messages the lanes are
// asked once in reverse order, so that one start in 16 goes to the least urgent lane and no command waits forever.
func (f *feed) askByPriority(ctx context.Context, free int64) bool {
	lanes, reverse := slices.All(f.lanes), f.sinceReverse >= 15
	if reverse {
		lanes, free = slices.Backward(f.lanes), max(free/16, 1)
	}
	for _, l := range lanes {
		if ctx.Err() != nil {
			return false
		}
		if l.parked.Load() {
			continue
		}
		n := f.reserve(min(free, max(f.svc.pullBytes()/f.svc.maxPayload(), 1))) // because FetchNoWait has no limit of bytes
		if n == 0 {                                                             // a command from a parked lane has taken the place
			return false
		}
		came := f.fetchNow(ctx, l, n)
		if f.reserved.Add(came - n); came > 0 {
			if f.sinceReverse += int(came); reverse {
				f.sinceReverse = 0
			}
			return true
		}
		l.parked.Store(true)
		consumer := l.consumer
		f.goPull(func() {
			f.await(ctx, consumer, func(m jetstream.Msg) bool { return f.accept(l, m) }, jetstream.PullMaxMessages(1))
			l.parked.Store(false)
			signal(f.wake)
		})
	}
	f.sinceReverse = 0
	return false
}

// goPull runs fn, which makes a pull request, on a goroutine that drain waits for.
func (f *feed) goPull(fn func()) {
	f.pulls.Add(1)
	f.fetching.Go(func() {
		defer f.pulls.Add(-1)
		fn()
	})
}

// accept takes a command from a parked lane, for which no room is reserved yet. It gives the command back if there is no room,
// or if something more urgent may be waiting, because a more urgent lane is not parked any more. It reports whether the lane
// stays parked, because it has no more commands and there is room for one.
func (f *feed) accept(from *lane, m jetstream.Msg) bool {
	urgent := slices.ContainsFunc(f.lanes[:slices.Index(f.lanes, from)], func(l *lane) bool { return !l.parked.Load() })
	if urgent || f.reserve(1) == 0 {
		f.svc.acknowledge(m.Reply(), nak)
		return false
	}
	f.queue <- boundMsg(m)
	return numPending(m) == 0 && f.reserved.Load() < int64(f.limit)
}

// numPending returns how many messages the consumer of m had after it.
func numPending(m jetstream.Msg) uint64 {
	meta, err := m.Metadata()
	if err != nil {
		return math.MaxUint64
	}
	return meta.NumPending
}

// reserve takes up to n of what the limit leaves free, and returns how many it has taken.
func (f *feed) reserve(n int64) int64 {
	for {
		reserved := f.reserved.Load()
		if n = max(min(n, int64(f.limit)-reserved), 0); f.reserved.CompareAndSwap(reserved, reserved+n) {
			return n
		}
	}
}

// await asks a consumer for messages, in the way that opts say, and passes them to take as they come, until all that were asked
// for have come, take reports false, ctx ends, or the request fails. When ctx ends, messages that are under way are still
// taken: those that the consumer has, within quietTime, and those that the server has sent, within drainTime.
func (f *feed) await(
	ctx context.Context, consumer jetstream.Consumer, take func(jetstream.Msg) bool, opts ...jetstream.PullMessagesOpt,
) {
	c := f.svc.carrier.conn.Load()
	it, err := consumer.Messages(append(opts, jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(pullHeartbeat))...)
	if err != nil {
		f.fail(err)
		return
	}
	defer it.Stop()
	waiting, stopWaiting := context.WithCancel(context.Background())
	defer stopWaiting()
	end := sync.OnceFunc(func() {
		if c.up.Load() {
			it.Drain()
		} else {
			it.Stop()
		}
		time.AfterFunc(drainTime, stopWaiting)
	})
	var latest atomic.Int64 // when the latest message came, or else the request was made, by the clock
	latest.Store(int64(clock()))
	defer context.AfterFunc(ctx, func() {
		// A message that the consumer has begun to send when the subscription ends would be lost until its ack wait is over.
		for until := clock() + drainTime; c.up.Load() && waiting.Err() == nil && clock() < until; {
			quiet := clock() - time.Duration(latest.Load())
			if quiet >= quietTime {
				break
			}
			sleep(waiting, quietTime-quiet)
		}
		end()
	})()
	opt := jetstream.NextContext(waiting)
	for more := true; more; {
		m, err := it.Next(opt)
		switch {
		case err == nil:
			latest.Store(int64(clock()))
			if more = take(m); ctx.Err() != nil && numPending(m) == 0 {
				end()
			}
		case errors.Is(err, jetstream.ErrMsgIteratorClosed), waiting.Err() != nil:
			return
		default: // the consumer was deleted, or the server is silent
			f.fail(err)
			end()
		}
	}
}

// pullSubject returns the subject of pull requests to a lane.
func (f *feed) pullSubject(l *lane) string {
	return "$JS.API.CONSUMER.MSG.NEXT." + f.stream.Name + "." + l.config.Durable
}

// fetchNow brings up to n of the messages that a lane has now, and returns how many it has brought. FetchNoWait of the jetstream
// package gives up after a second without a message, and what is under way then is redelivered only after its ack wait.
func (f *feed) fetchNow(ctx context.Context, l *lane, n int64) (came int64) {
	c := f.svc.carrier.conn.Load()
	drops := c.drops.Load()
	answers := make(chan *nats.Msg, n+1) // the one is for the status that follows if there are fewer messages
	sub, err := c.nc.ChanSubscribe(c.newInbox(), answers)
	if err != nil {
		f.fail(err)
		return 0
	}
	defer sub.Unsubscribe()
	request := fmt.Sprintf(`{"batch":%d,"no_wait":true}`, n)
	err = c.nc.PublishRequest(f.pullSubject(l), sub.Subject, []byte(request))
	silence := time.NewTicker(time.Second)
	defer silence.Stop()
	for begin := clock(); err == nil && came < n; {
		select {
		case m := <-answers:
			begin = clock()
			switch status := m.Header.Get("Status"); {
			case len(m.Data) > 0 || status == "":
				came++
				f.queue <- m
			case status == "404" || status == "408": // there are no more
				return came
			default:
				err = fmt.Errorf("%s %s", status, m.Header.Get("Description"))
			}
		case <-silence.C:
			switch quiet := clock() - begin; {
			case !c.up.Load() || c.drops.Load() != drops: // what was under way is lost with the connection
				return came
			case ctx.Err() != nil && quiet > drainTime: // the server hangs: it redelivers what is under way
				return came
			case quiet > fetchTimeout:
				err = nats.ErrTimeout
			}
		}
	}
	if err != nil {
		f.fail(err)
	}
	return came
}

// fail makes fetch check the consumers before it asks again.
func (f *feed) fail(err error) {
	f.failed.Store(true)
	f.svc.log.Warn("messages can't be fetched", "endpoint", f.name, "error", err)
}

// boundMsg returns the message of the jetstream package as one for the queue.
func boundMsg(m jetstream.Msg) *nats.Msg {
	return &nats.Msg{Subject: m.Subject(), Reply: m.Reply(), Header: m.Headers(), Data: m.Data(), Sub: bound}
}

var bound = &nats.Subscription{} // Metadata wants a message to have one

// drain asks for no more messages, and waits until those under way have come.
func (f *feed) drain(context.Context) {
	f.mu.Lock()
	f.drained = true
	f.cancel()
	f.mu.Unlock()
	f.fetching.Wait()
}

// busy reports whether messages are in the queue, are being handled, or may still come because they were asked for.
func (f *feed) busy() bool { return f.pulls.Load() > 0 || f.endpoint.busy() }

// release frees the room of a message that has been handled, and wakes fetch if it is worth asking for more.
func (f *feed) release() {
	if f.worthAsking(int64(f.limit) - f.reserved.Add(-1)) {
		signal(f.wake)
	}
}

// acknowledge reports to the server how the delivery of m has ended: ack, nak, and so on. If the acknowledgement is lost, the
// message is redelivered after its ack wait.
func (f *feed) acknowledge(m *nats.Msg, how string) { f.svc.acknowledge(m.Reply, how) }

// nakAfter returns the acknowledgement that makes the server redeliver a message after a pause.
func nakAfter(pause time.Duration) string {
	return nak + ` {"delay":` + strconv.FormatInt(int64(pause), 10) + "}"
}

// giveBack returns a message to the server because this instance is not to handle it now. As long as a request of this instance
// may bring the message right back, it is redelivered after a pause only.
func (f *feed) giveBack(m *nats.Msg) {
	how := nak
	if f.pulls.Load() > 0 {
		how = nakAfter(returnPause)
	}
	f.acknowledge(m, how)
}

// keepAlive extends the ack wait of messages that take long to handle, so that the server does not redeliver them before their
// deadline. When the connection is back it does that at once, and makes fetch check the consumers and ask again. It returns
// when the endpoint is finished. Then it deletes the consumer of a Broadcast subscription without WithID, because no other
// instance will ever use that.
func (f *feed) keepAlive() {
	for {
		interval, minAge := time.Duration(f.ackWait.Load())/3, time.Duration(0)
		select {
		case <-time.After(interval):
			minAge = interval / 2 // a message that has just begun has time until the next tick
		case <-f.renew:
			f.renewed.Store(true)
			f.mu.Lock()
			f.endPulls()
			f.mu.Unlock()
			signal(f.wake)
		case <-f.finished:
			if f.cfg.broadcast && f.svc.cfg.id == nil { // if this is lost, the server does it after an hour
				f.svc.notify("$JS.API.CONSUMER.DELETE."+f.stream.Name+"."+f.lanes[0].config.Durable, nil)
			}
			return
		}
		for _, m := range f.handling(minAge, f.cfg.deadline+interval) { // a handler that ignores its deadline loses its message
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
	consumer     string
	time         time.Time // when the message was first stored
	stored       time.Time // when it was stored as it is
	fromSchedule bool      // whether a schedule has sent it, so that a command has no record yet
	sequence     uint64    // in the stream
	attempt      int       // 1 for the first delivery
}

// newRequest returns the request for a message that has arrived, or nil if the message is not one for this feed.
func (f *feed) newRequest(m *nats.Msg, arrived time.Time) *request {
	meta, err := m.Metadata()
	id := m.Header.Get(headerID)
	fromSchedule := false
	if err == nil && f.kind == kindCommand && id == "" {
		id = firingID(m, meta.Timestamp)
		fromSchedule = id != ""
	}
	if err != nil || meta.Stream != f.stream.Name || f.kind == kindCommand && id == "" ||
		!slices.ContainsFunc(f.lanes, func(l *lane) bool { return l.config.Durable == meta.Consumer }) {
		f.svc.log.Warn("dropped a message that is no "+f.kind,
			"endpoint", f.name, "correlation_id", m.Header.Get(headerCorrelation), "subject", m.Subject)
		return nil
	}
	both := &struct { // one allocation
		request
		delivery
	}{}
	r, d := &both.request, &both.delivery
	*d = delivery{consumer: meta.Consumer, stored: meta.Timestamp, sequence: meta.Sequence.Stream, attempt: int(meta.NumDelivered)}
	d.time, d.fromSchedule = d.stored, fromSchedule
	r.svc, r.in, r.deadline, r.delivery = f.svc, m, arrived.Add(f.cfg.deadline), d
	r.msg = Message{Kind: f.kind, Subject: m.Subject, Header: m.Header, Data: m.Data}
	if strings.HasPrefix(m.Subject, redrivePrefix) { // the headers say where the message came from
		r.msg.Subject = m.Header.Get(headerSubject)
		if t, err := time.Parse(time.RFC3339Nano, m.Header.Get(headerTime)); err == nil {
			d.time = t
		}
		if first, err := strconv.ParseUint(m.Header.Get(headerAttempt), 10, 31); err == nil && first > 0 {
			d.attempt += int(first) - 1
		}
	} else if f.kind == kindEvent {
		id = cmp.Or(m.Header.Get(jetstream.MsgIDHeader), id) // one that was scheduled has Aegis-Id
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
