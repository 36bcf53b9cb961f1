package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the pool of connections, and request, which sends a message and waits for its one answer. RPC, publishing, the
// records of commands and every compare-and-swap go through request. It is the one place where a message that can't be sent, or
// is not answered, becomes an Error.

// A conn is one connection of the pool and its reply slots.
type conn struct {
	nc           *nats.Conn
	js           jetstream.JetStream
	inbox        string                // the prefix of this connection's reply subjects, with the dot at its end
	up           atomic.Bool           // whether it is connected, as far as nats.go's callbacks have said
	first        chan struct{}         // closed when it is connected for the first time
	connectedAt  atomic.Int64          // when it was connected last, by the clock
	lastReported atomic.Pointer[error] // the latest error that nats.go has passed to AsyncErrorCB
	maxPayload   atomic.Int64          // the server's max_payload

	drops, reconnects atomic.Uint32 // how often the connection was lost, and how often it was made again

	sendMu  sync.Mutex // guards the next two
	pending []outgoing // messages that the goroutine which added the first of them will publish
	spare   []outgoing // the empty slice that pending becomes next, so that no new one is allocated

	inboxCount atomic.Uint64 // how many newInbox has made
	probing    atomic.Int32  // how often the server has refused a subscription since probeSlots began, and 1 while it runs
	slotsMu    sync.Mutex    // guards the rest
	slots      map[*slot]bool
	free       []*slot       // the slots without a call; the one used last is at the end
	room       int           // how many slots the server allowed when it refused one
	roomUntil  time.Duration // until when that counts, by the clock
}

const maxSlots = 8192 // calls that may wait for their answers on one connection

// connect makes one connection of the pool.
func (s *Service) connect() (_ *conn, err error) {
	c := &conn{slots: map[*slot]bool{}, first: make(chan struct{})}
	opts := nats.GetDefaultOptions()
	opts.Servers, opts.Name = s.cfg.urls, s.id
	opts.MaxReconnect = -1 // no limit
	opts.CustomReconnectDelayCB = func(rounds int) time.Duration { return backoff(rounds, 50*time.Millisecond, 5*time.Second) }
	opts.IgnoreAuthErrorAbort = true // it goes on reconnecting, because the credentials may be renewed
	opts.PingInterval = 10 * time.Second
	opts.FlusherTimeout = 2 * time.Second // a server that does not read any more counts as gone
	opts.ReconnectOnFlusherError = true
	for _, opt := range s.cfg.nats {
		if err := opt(&opts); err != nil {
			return nil, newError(ErrInvalid, "WithNATS: %v", err)
		}
	}
	opts.ReconnectBufSize = -1 // no buffer, because what is in it would be sent after its caller had given up
	// nats.go's own requests use this prefix, too.
	opts.InboxPrefix = cmp.Or(opts.InboxPrefix, strings.TrimSuffix(nats.InboxPrefix, ".")) + "." + s.name
	disconnected, connected, reconnected, failed := opts.DisconnectedErrCB, opts.ConnectedCB, opts.ReconnectedCB, opts.AsyncErrorCB
	closed := opts.ClosedCB
	opts.DisconnectedErrCB = func(nc *nats.Conn, err error) {
		c.disconnected()
		if !nc.IsClosed() {
			s.log.Warn("disconnected from NATS", "error", err)
		}
		if disconnected != nil {
			disconnected(nc, err)
		}
	}
	opts.ClosedCB = func(nc *nats.Conn) {
		c.disconnected()
		if !s.closed.Load() {
			why := cmp.Or(nc.LastError(), nats.ErrConnectionClosed)
			failure := newError(ErrUnavailable, "the connection to %s was closed for good: %v", redacted(s.cfg.urls), why)
			s.log.Error("a connection to NATS was closed, and the service can't go on", "error", failure)
			s.breakDown(failure)
		}
		if closed != nil {
			closed(nc)
		}
	}
	opts.ConnectedCB = func(nc *nats.Conn) {
		c.connected(nc)
		close(c.first)
		if connected != nil {
			connected(nc)
		}
	}
	opts.ReconnectedCB = func(nc *nats.Conn) {
		c.connected(nc)
		c.reconnects.Add(1)
		s.log.Info("reconnected to NATS", "url", nc.ConnectedUrlRedacted())
		if reconnected != nil {
			reconnected(nc)
		}
	}
	opts.AsyncErrorCB = func(nc *nats.Conn, sub *nats.Subscription, err error) {
		level := slog.LevelError
		switch {
		case errors.Is(err, nats.ErrPermissionViolation):
			if s.denials.note(err); strings.Contains(err.Error(), infoSubject) {
				level = slog.LevelInfo // without this question, an error is only less exact
			}
			c.wakeSlots()
		case errors.Is(err, nats.ErrMaxSubscriptionsExceeded):
			s.denials.note(err)
			if c.probing.Add(1) == 1 {
				s.startTask(func() { c.probeSlots(s.base, &s.denials) })
			}
		}
		s.log.Log(context.Background(), level, "NATS reports an error", "subject", cmp.Or(sub, &nats.Subscription{}).Subject, "error", err)
		c.lastReported.Store(&err) // after note, because checkDenials relies on that
		if failed != nil {
			failed(nc, sub, err)
		}
	}
	if c.nc, err = opts.Connect(); err != nil {
		return nil, newError(ErrUnavailable, "connecting to %s: %v", redacted(opts.Servers), err)
	}
	c.js, _ = jetstream.New(c.nc) // without options it can't fail
	if c.nc.IsConnected() {
		<-c.first
	} else { // which New accepts only with nats.RetryOnFailedConnect
		s.log.Warn("not connected to NATS yet", "urls", redacted(opts.Servers))
	}
	c.inbox = opts.InboxPrefix + "." + rand.Text()[:connectionToken] + "."
	return c, nil
}

// redacted returns the URLs without their passwords, for errors and logs.
func redacted(urls []string) string {
	out := slices.Clone(urls)
	for i := range out {
		if u, err := url.Parse(out[i]); err == nil {
			out[i] = u.Redacted()
		}
	}
	return strings.Join(out, ", ")
}

// connected is called when the connection is made, for the first time or again. Only this function and disconnected change up,
// and nats.go calls them in order.
func (c *conn) connected(nc *nats.Conn) {
	c.maxPayload.Store(nc.MaxPayload())
	c.connectedAt.Store(int64(clock()))
	c.up.Store(true)
}

// disconnected makes the calls that wait on c fail. It is called when the connection is lost, and when the service closes it.
func (c *conn) disconnected() {
	c.up.Store(false)
	c.drops.Add(1)
	c.wakeSlots()
}

// awaitConnections waits until all connections are up.
func (s *Service) awaitConnections(ctx context.Context) error {
	for _, c := range s.conns {
		for !c.up.Load() {
			select {
			case <-time.After(10 * time.Millisecond):
			case <-s.broken.Done():
				return context.Cause(s.broken)
			case <-s.quitting.Done():
				return s.closedError()
			case <-ctx.Done():
				failure := s.disconnectedError()
				failure.Cause = asError(ctx.Err())
				return failure
			}
		}
	}
	return nil
}

// maxPayload returns the smallest max_payload of the connected servers. Before the first connection it is that of nats-server as it
// comes.
func (s *Service) maxPayload() int64 {
	least := int64(0)
	for _, c := range s.conns {
		if most := c.maxPayload.Load(); most > 0 && (least == 0 || most < least) {
			least = most
		}
	}
	return cmp.Or(least, 1<<20)
}

// pick returns the next connection that is up, nil if none is.
func (s *Service) pick() *conn { return s.pickOther(nil) }

// pickOther returns the next connection that is up, if possible another one than c, or nil if none is up.
func (s *Service) pickOther(c *conn) *conn {
	n := s.next.Add(1)
	for i := range uint32(len(s.conns)) {
		if other := s.conns[(n+i)%uint32(len(s.conns))]; other.up.Load() && other != c {
			return other
		}
	}
	if c != nil && c.up.Load() {
		return c
	}
	return nil
}

// disconnectedError returns the error of a call when no connection is up.
func (s *Service) disconnectedError() *Error {
	if s.closed.Load() {
		return notRun(s.closedError())
	}
	return notRun(newError(ErrUnavailable, "no connection to %s", redacted(s.cfg.urls)))
}

// An exchange is a message that request sends, and the reply subject that it was sent with.
type exchange struct {
	subject     string
	header      nats.Header
	data        []byte
	correlation string        // the correlation id to pass on; if it is "", <connection>.<slot>.<call> of reply serves as one
	until       time.Duration // the deadline, by the clock; the time left when it is sent is the handler's budget
	on          *conn         // the connection to send it on; nil for any that is up
	timed       bool          // whether to send the time left as a header, too
	stored      bool          // whether it is for a stream, whose acknowledgement is the answer
	term        *leadership   // of the instance that it is for, if the answer depends on that, else nil
	reply       string        // the reply subject of the latest attempt
}

// within sets the deadline of x to the end of ctx, but at most this long from now.
func (x *exchange) within(ctx context.Context, most time.Duration) *exchange {
	x.until = clock() + min(timeLeft(ctx, most), most)
	return x
}

// timeLeft returns the time until ctx ends, or usual if ctx has no deadline.
func timeLeft(ctx context.Context, usual time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		usual = time.Until(deadline)
	}
	return min(usual, maxBudget)
}

const maxBudget = 365 * 24 * time.Hour // more might not fit into the reply subject, or overflow the clock

// withRetries makes attempts to send x, within ctx's time, until one succeeds or no other may follow. An attempt reports again if
// another may follow its failure.
func (s *Service) withRetries(
	ctx context.Context, x *exchange, cfg *callConfig, attempt func() (answer *nats.Msg, failure *Error, again bool),
) (*nats.Msg, *Error) {
	policy := cfg.policy()
	end := clock() + timeLeft(ctx, s.cfg.timeout)
	mayHaveRun := false
	var last *Error // the failure that explains why attempt after attempt failed
	for n := 1; ; n++ {
		x.until = end
		if cfg.idempotent {
			x.until = min(end, clock()+min(policy.AttemptTimeout, maxBudget))
		}
		answer, failure, again := attempt()
		if failure == nil {
			return answer, nil
		}
		mayHaveRun = mayHaveRun || !failure.NotRun
		failure.NotRun = !mayHaveRun
		if !again || n >= policy.Attempts {
			if failure.Source == "" && (failure.Code == ErrTimeout.Code || failure.Code == ErrCanceled.Code) {
				failure.Cause = last // last says more than that the time was up
			}
			return nil, failure
		}
		// Otherwise the time was up in the middle of this attempt, and the failure of an earlier one says more.
		if last == nil || !failure.NotRun || ctx.Err() == nil && clock() < end {
			last = failure
		}
		sleep(ctx, min(backoff(n, policy.Backoff, policy.MaxBackoff), end-clock()))
		if ended := asError(ctx.Err()); ended != nil || clock() >= end {
			timeout := newError(cmp.Or(ended, ErrTimeout), "gave up on %s after %d attempts", x.subject, n)
			timeout.NotRun, timeout.Cause = failure.NotRun, last
			return nil, timeout
		}
	}
}

// These two errors are compared by identity.
var errNoResponders = notRun(newError(ErrUnavailable, "no responders")) // nobody has subscribed to the subject
var errDropped = &Error{}                                               // the connection was lost before anything was written

// request publishes x and waits for its answer, at most until x.until. If the connection was lost before anything was written, it
// tries another one, unless x is for a certain connection. errNoResponders is returned as it is; the caller has to explain it.
func (s *Service) request(ctx context.Context, x *exchange) (*nats.Msg, *Error) {
	if err := ctx.Err(); err != nil {
		return nil, notRun(asError(err))
	}
	begin := clock()
	if x.until <= begin {
		return nil, notRun(newError(ErrTimeout, "no time left for %s", x.subject))
	}
	for range s.conns {
		c := x.on
		if c == nil {
			c = s.pick() // only then, because it counts
		}
		if c == nil {
			break
		}
		var answer *nats.Msg
		sl, failure := c.slot()
		if failure == nil {
			sl.since = begin
			answer, failure = s.roundTrip(ctx, c, sl, x)
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

// roundTrip sends x on c and waits for its answer in the slot. It returns errDropped if c was lost before anything was written.
func (s *Service) roundTrip(ctx context.Context, c *conn, sl *slot, x *exchange) (*nats.Msg, *Error) {
	sl.calls += 1 + mrand.Uint64N(1<<20) // a random step, so that nobody can guess the next number from the last
	b := append(make([]byte, 0, 256), sl.prefix...)
	b = strconv.AppendUint(b, sl.calls, 36)
	if x.correlation != "" {
		b = append(append(b, '-'), x.correlation...)
	}
	b = strconv.AppendInt(append(b, '.'), max((x.until-clock()).Milliseconds(), 1), 10)
	x.reply = string(b)
	sl.drops = c.drops.Load() // before up, so that no loss of the connection is missed
	if !c.up.Load() {
		return nil, errDropped
	}
	sl.wakeAt(x.until)
	if x.timed {
		x.header = withHeader(x.header, headerTimeout, max(x.until-clock(), time.Millisecond).Round(time.Millisecond).String())
	}

	switch err := c.publish(outgoing{nats.Msg{Subject: x.subject, Reply: x.reply, Header: x.header, Data: x.data}, x.until, sl.drops}); {
	case err == nil:
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return nil, errDropped
	case errors.Is(err, nats.ErrMaxPayload):
		return nil, notRun(newError(ErrInvalid, "the request to %s has %d bytes, more than the server's max_payload of %d", x.subject, len(x.data), c.nc.MaxPayload()))
	case errors.Is(err, nats.ErrBadHeaderMsg):
		return nil, notRun(newError(ErrInvalid, "the request to %s has a header whose key is not an HTTP token: %q", x.subject, slices.Collect(maps.Keys(x.header))))
	case errors.Is(err, nats.ErrConnectionClosed):
		return nil, s.disconnectedError()
	default: // part of it may have been written
		return nil, newError(ErrUnavailable, "publishing to %s: %v", x.subject, err)
	}

	var failure *Error
	termChanged := x.term.nextChange()
	for failure == nil {
		select {
		case m := <-sl.answers:
			switch {
			case m == nil:
				failure = s.answerLost(c, sl, x.subject)
			case m.Subject != x.reply: // a late or a second answer to an earlier call, or the message of probeSlots
				sl.strays = sl.strays || !strings.HasSuffix(m.Subject, "."+probeToken)
				failure = s.answerLost(c, sl, x.subject)
			case isNoResponders(m):
				return nil, errNoResponders
			case !x.stored && isPubAck(m): // a stream takes the subject too, and the answer is still to come
			default:
				return m, nil
			}
		case <-termChanged:
			failure, termChanged = x.term.superseded()
		case <-ctx.Done():
			failure = asError(ctx.Err())
		}
	}
	if failure.Code != ErrDenied.Code { // the call may have run: add what it takes to find it in the logs of both sides
		within := (x.until - sl.since).Round(time.Millisecond)
		failure = newError(failure, "no answer from %s within %v: %s", x.subject, within, failure.Message)
		failure.Details = map[string]string{"correlation_id": parseAddress(x.reply).correlationID()}
	}
	return nil, failure
}

// isNoResponders reports whether m is the server's answer to a message whose subject nobody has subscribed to.
func isNoResponders(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }

// answerLost returns the reason why sl can't get an answer to the message that was sent to subject any more, or nil if the answer
// may still come.
func (s *Service) answerLost(c *conn, sl *slot, subject string) *Error {
	noAnswers := s.denials.since(sl.since, toSubscribe+sl.sub.Subject)
	if noAnswers != nil {
		noAnswers.NotRun = false // the message itself may have arrived
		sl.missed = maxMissed    // so that release ends the slot, which can't hear any answer
	}
	switch denied := cmp.Or(s.denials.since(sl.since, toPublish+subject), noAnswers); {
	case denied != nil:
		return denied
	case sl.refused.Load():
		sl.missed = maxMissed
		return newError(ErrOverloaded, "the server refused the subscription for the answer: %s", tooMany)
	case s.closed.Load():
		return s.closedError()
	case c.drops.Load() != sl.drops:
		return newError(ErrUnavailable, "the connection was lost")
	case clock() >= sl.until:
		return newError(ErrTimeout, "%v", context.DeadlineExceeded)
	}
	return nil
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
		return from, notRun(newError(ErrInvalid, "%s: %.40q: want a duration such as 1.5s, or milliseconds, more than 0", headerTimeout, text))
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

// A slot waits for the answer to one call at a time. It is a subscription to <inbox>.<slot>.> that is used again and again, so
// that the connection's read loop hands an answer straight to the waiting caller. The number of the call in the reply subject
// distinguishes an answer to this call from a late answer to an earlier one. A nil among the answers makes the caller check
// whether its answer can still come; see answerLost.
type slot struct {
	sub     *nats.Subscription
	prefix  string // of the reply subjects
	answers chan *nats.Msg
	alarm   *time.Timer // wakes the caller when its time is up
	missed  int         // how many calls ended without an answer, whose late answers may still come and fill the channel
	calls   uint64      // the number of the latest call
	strays  bool        // whether a message came that belongs to no call, so that others may follow and fill the channel
	refused atomic.Bool // whether the server has refused the subscription

	// Of the present call:
	since, until time.Duration // its begin and its deadline, by the clock
	drops        uint32        // of the connection, when the call began
}

// wakeAt sets the deadline of the present call, and makes alarm wake its caller then.
func (sl *slot) wakeAt(until time.Duration) {
	sl.until = until
	sl.alarm.Reset(until - clock())
}

// wake makes the waiting caller check whether its answer can still come.
func (sl *slot) wake() {
	select {
	case sl.answers <- nil:
	default: // the channel is full, so the caller wakes anyway
	}
}

// wakeSlots wakes every caller that waits on c.
func (c *conn) wakeSlots() {
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	for sl := range c.slots {
		sl.wake()
	}
}

// slot returns the free slot that was used last, or a new one.
func (c *conn) slot() (*slot, *Error) {
	for {
		c.slotsMu.Lock()
		n := len(c.free)
		if n == 0 {
			c.slotsMu.Unlock()
			return c.newSlot(c.newInbox()+".>", slotRoom)
		}
		sl := c.free[n-1]
		c.free = c.free[:n-1]
		c.slotsMu.Unlock()
		for len(sl.answers) > 0 { // a nil from wakeSlots, or a late or second answer to an earlier call
			sl.strays = <-sl.answers != nil || sl.strays
		}
		if !sl.strays && !sl.refused.Load() {
			return sl, nil
		}
		c.endSlot(sl)
	}
}

// newSlot makes a slot, whose present call begins now. It gets the messages to subject, which may end in >, and has room for that
// many; more are lost.
func (c *conn) newSlot(subject string, room int) (*slot, *Error) {
	sl := &slot{prefix: strings.TrimSuffix(subject, ">"), calls: mrand.Uint64N(1 << 32), answers: make(chan *nats.Msg, room)}
	sl.alarm = time.AfterFunc(time.Hour, sl.wake)
	c.slotsMu.Lock()
	// If the server has refused a slot a moment ago, there may be as many as it allowed, because a message whose answer can't be heard
	// is better not sent.
	most, why := maxSlots, "try later, or use WithPool for more connections"
	if clock() < c.roomUntil {
		most, why = c.room, tooMany
	}
	if len(c.slots) >= most {
		defer c.slotsMu.Unlock()
		return nil, notRun(newError(ErrOverloaded, "%d calls wait for their answers: %s", most, why))
	}
	c.slots[sl] = true
	c.slotsMu.Unlock()
	sub, err := c.nc.ChanSubscribe(subject, sl.answers)
	c.slotsMu.Lock()
	sl.sub = sub
	c.slotsMu.Unlock()
	if err != nil { // the connection is closed
		c.endSlot(sl)
		return nil, errDropped
	}
	sl.drops, sl.since = c.drops.Load(), clock()
	return sl, nil
}

// newInbox returns a reply subject that nobody else uses.
func (c *conn) newInbox() string { return c.inbox + strconv.FormatUint(c.inboxCount.Add(1), 10) }

const (
	maxMissed = 8   // a slot is ended after that many calls without an answer
	slotRoom  = 128 // for late answers, and for second answers to one call, before those to the next one
)

// release makes a slot free for the next call. It ends the slot if messages that belong to no call may fill its channel.
func (c *conn) release(sl *slot, answered bool) {
	sl.alarm.Stop()
	if !answered {
		sl.missed++
	}
	if sl.strays || sl.missed >= maxMissed || len(sl.answers) > 0 {
		c.endSlot(sl)
		return
	}
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	c.free = append(c.free, sl)
}

const probeToken = "probe" // the last token of the subject of a message from probeSlots

// probeSlots finds out which subscriptions of slots the server has refused, because its error does not say that. It sends a
// message to each slot. The server answers a flush after it has delivered these messages, so a slot that has not got its message
// by then was refused. Its caller learns that at once.
func (c *conn) probeSlots(ctx context.Context, denials *denials) {
	for n := int32(1); n > 0; n = c.probing.Add(-n) {
		n = c.probing.Load()
		before := map[*slot]int64{} // how many messages each has got
		c.slotsMu.Lock()
		for sl := range c.slots {
			if sl.sub != nil {
				before[sl], _ = sl.sub.Delivered()
			}
		}
		c.slotsMu.Unlock()
		if denials.since(clock()-time.Minute, toPublish+c.inbox+">") == nil { // otherwise all count as refused
			for sl := range before {
				if strings.HasPrefix(sl.prefix, c.inbox) { // one that follows a command begins anew instead
					_ = c.nc.Publish(strings.Replace(sl.sub.Subject, ">", probeToken, 1), nil)
				}
			}
		}
		if c.flush(ctx) != nil {
			continue // the connection is lost, and with it the calls
		}
		c.slotsMu.Lock()
		for sl, count := range before {
			if now, err := sl.sub.Delivered(); err == nil && now == count && len(sl.answers) < cap(sl.answers) {
				sl.refused.Store(true)
				sl.wake()
				delete(c.slots, sl)
			}
		}
		c.room, c.roomUntil = len(c.slots), clock()+10*time.Second
		c.slotsMu.Unlock()
	}
}

// endSlot ends the slot's subscription.
func (c *conn) endSlot(sl *slot) {
	sl.alarm.Stop()
	_ = sl.sub.Unsubscribe() // fails only on a closed connection
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	delete(c.slots, sl)
}

// An outgoing is a message that waits to be published. It is dropped at its deadline, until, or if the connection is lost
// meanwhile, so that drops is not the connection's any more.
type outgoing struct {
	nats.Msg
	until time.Duration
	drops uint32
}

// publish sends m together with the messages that other goroutines publish at the same time. Without this, nats.go would write to
// the socket whenever one of them begins to wait for its answer. So the goroutine that comes first yields to the others once, and
// then publishes everything that they have left in pending meanwhile. That makes about 50 messages per write instead of 2, and
// costs a lone caller nothing.
//
// The error is that of m if its goroutine came first, and nil otherwise. Then m can fail only because the connection is lost, and
// the waiting caller learns that from its slot.
func (c *conn) publish(m outgoing) (err error) {
	if !m.surelyFits(c.maxPayload.Load()) {
		return c.nc.PublishMsg(&m.Msg)
	}
	c.sendMu.Lock()
	c.pending = append(c.pending, m)
	first := len(c.pending) == 1
	c.sendMu.Unlock()
	if !first {
		return nil
	}
	runtime.Gosched()
	c.sendMu.Lock()
	batch := c.pending
	c.pending, c.spare = c.spare, nil
	c.sendMu.Unlock()
	now := clock()
	for i, m := range batch {
		if m.until <= now || m.drops != c.drops.Load() {
			continue
		}
		if failure := c.nc.PublishMsg(&m.Msg); i == 0 {
			err = failure
		}
	}
	clear(batch)
	c.sendMu.Lock()
	c.spare = batch[:0]
	c.sendMu.Unlock()
	return err
}

// surelyFits reports whether nats.go will accept the size of m and the keys of its header. It is on the safe side: of what it
// turns down, nats.go may still accept some.
func (m *outgoing) surelyFits(limit int64) bool {
	for key := range m.Header {
		if !isToken(key, 128) {
			return false
		}
	}
	return messageSize(m.Header, m.Data)+64 <= limit
}

// messageSize returns about the size that the server compares with its max_payload.
func messageSize(h nats.Header, data []byte) int64 {
	size := len(data)
	for key, values := range h {
		for _, v := range values {
			size += len(key) + len(v) + 4
		}
	}
	return int64(size)
}

// notify publishes a message that nobody answers. It may be lost.
func (s *Service) notify(subject string, data []byte) {
	if c := s.pick(); c != nil {
		_ = c.nc.Publish(subject, data)
	}
}

// flush waits until the servers have processed everything that was sent, on every connection.
func (s *Service) flush(ctx context.Context) (failure *Error) {
	for _, c := range s.conns {
		if err := c.flush(ctx); err != nil {
			failure = newError(ErrUnavailable, "no answer from %s: %v", redacted(s.cfg.urls), err)
		}
	}
	return failure
}

// flush waits until the server has processed everything that was sent on c. Without a deadline in ctx it waits for 5 s at most.
func (c *conn) flush(ctx context.Context) error {
	ctx, cancel := withDeadline(ctx, 5*time.Second)
	defer cancel()
	if !c.up.Load() || !c.nc.IsConnected() { // otherwise FlushWithContext would wait for the connection to come back
		return nats.ErrDisconnected
	}
	return c.nc.FlushWithContext(ctx)
}

// denials remembers what the server's permissions have denied. The server does not answer a message that it denies. It reports
// the denial with the subject, but without the message's reply subject, so that the caller has to look for it here.
type denials struct {
	mu     sync.Mutex               // guards latest
	latest map[string]time.Duration // the time of the latest denial; the key is toPublish or toSubscribe and the subject, or tooMany
}

const toPublish, toSubscribe = "publish to ", "subscribe to "
const tooMany = "the connection has as many as the server allows (max_subscriptions): raise that, or make fewer calls at once"
const maxDenials = 256

var denialPattern = regexp.MustCompile(`(Publish|Subscription) to "([^"]+)"`)

// note remembers a denial that nats.go has reported. If there are too many, it forgets the earlier ones.
func (d *denials) note(err error) {
	what := tooMany
	if m := denialPattern.FindStringSubmatch(err.Error()); m != nil {
		what = map[string]string{"Publish": toPublish, "Subscription": toSubscribe}[m[1]] + m[2]
	} else if !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.latest == nil || len(d.latest) >= maxDenials {
		d.latest = map[string]time.Duration{}
	}
	d.latest[what] = clock()
}

// since returns the error for a denial at the time begin or later, or nil if there was none. With patterns, it looks only for
// denials of what one of them covers. A pattern begins with toPublish or toSubscribe.
func (d *denials) since(begin time.Duration, patterns ...string) *Error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for what, at := range d.latest {
		if at >= begin && (len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool { return covers(p, what) })) {
			if what == tooMany {
				return notRun(newError(ErrOverloaded, "the server refused a subscription: %s", tooMany))
			}
			return notRun(newError(ErrDenied, "the server's permissions don't allow to %s", what))
		}
	}
	return nil
}

// probePublish makes the server report now whether it denies what the service will publish to the subjects later; see
// checkDenials. The messages have no effect, because they are for a stream that does not exist, and ask for no answer.
func (s *Service) probePublish(subjects ...string) {
	for _, subject := range subjects {
		if c := s.pick(); c != nil {
			_ = c.nc.PublishMsg(&nats.Msg{Subject: subject, Header: nats.Header{jetstream.ExpectedStreamHeader: {"none"}}})
		}
	}
}

// checkDenials waits until the servers have processed everything that was sent, and returns an error if they have denied anything
// since begin.
func (s *Service) checkDenials(ctx context.Context, begin time.Duration) error {
	if failure := s.flush(ctx); failure != nil {
		return failure
	}
	for _, c := range s.conns { // LastError knows an error a moment before AsyncErrorCB is called
		last, end := c.nc.LastError(), clock()+time.Second
		for isRefusal(last) && *cmp.Or(c.lastReported.Load(), new(error)) != last && clock() < end {
			time.Sleep(time.Millisecond)
		}
	}
	return s.denials.since(begin).orNil()
}

// isRefusal reports whether err is the server's refusal of a message or a subscription.
func isRefusal(err error) bool {
	return errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrMaxSubscriptionsExceeded)
}

// Time.

// clock returns the monotonic time since the process began. "By the clock" in a comment means that a time is measured so.
func clock() time.Duration { return time.Since(clockStart) }

var clockStart = time.Now()

// backoff returns the pause after attempt n, which is random between 0 and first·2ⁿ⁻¹, and at most longest.
func backoff(n int, first, longest time.Duration) time.Duration {
	d := longest
	if n = max(n, 1); n < 64 && first <= longest>>(n-1) {
		d = first << (n - 1)
	}
	return mrand.N(d + 1)
}

// sleep pauses for d. It reports false if ctx ends before d is over.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// withDeadline returns ctx, with a timeout of d if it has no deadline.
func withDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, timeLeft(ctx, d))
}
