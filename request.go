package aegis

import (
	"cmp"
	"context"
	"errors"
	"maps"
	mrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has request, which sends a message and waits for its one answer, in a slot. RPC, publishing, the records of commands
// and every compare-and-swap go through request. It is the one place where a message that can't be sent, or is not answered,
// becomes an Error.

// An exchange is one message, and what request needs to send it: the deadline, the connection, and what counts as its answer.
// It is used again for each attempt.
type exchange struct {
	subject     string
	header      nats.Header
	data        []byte
	correlation string        // the correlation id to pass on; "" for none: then the receiver makes one of the reply subject
	until       time.Duration // the deadline, by the clock; the time left when it is sent is the handler's budget
	on          *conn         // the connection to send it on; nil for any that is up
	sendTimeout bool          // whether to send the time left as a header, too
	toStream    bool          // whether it is for a stream, whose acknowledgement is the answer
	term        *expectedTerm // of the instance that it is for, if the answer depends on that, else nil
	reply       string        // the reply subject of the latest attempt
}

// within sets the deadline of x to the end of ctx, but at most this long from now.
func (x *exchange) within(ctx context.Context, most time.Duration) *exchange {
	x.until = clock() + min(timeLeft(ctx, most), most)
	return x
}

// withRetries makes attempts to send x, within ctx's time, until one succeeds or no other may follow. An attempt reports again if
// another may follow its failure.
func (s *Service) withRetries(
	ctx context.Context, x *exchange, cfg *callConfig, attempt func() (answer *nats.Msg, failure *Error, again bool),
) (*nats.Msg, *Error) {
	policy := cfg.policy()
	end := clock() + timeLeft(ctx, s.cfg.timeout)
	mayHaveRun := false
	var reason *Error // why the attempts failed, as far as that is known
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
				failure.Cause = reason // which says more than that the time was up
			}
			return nil, failure
		}
		// Keep the reason of an earlier attempt if this one only ran out of time.
		if reason == nil || !failure.NotRun || ctx.Err() == nil && clock() < end {
			reason = failure
		}
		sleep(ctx, min(backoff(n, policy.Backoff, policy.MaxBackoff), end-clock()))
		if ended := asError(ctx.Err()); ended != nil || clock() >= end {
			timeout := newError(cmp.Or(ended, ErrTimeout), "gave up on %s after %d attempts", x.subject, n)
			timeout.NotRun, timeout.Cause, timeout.Details = failure.NotRun, reason, failure.Details
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
			c = s.pick() // not for a certain connection, because pick takes turns
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
	if x.sendTimeout {
		x.header = withHeader(x.header, headerTimeout, max(x.until-clock(), time.Millisecond).Round(time.Millisecond).String())
	}

	m := nats.Msg{Subject: x.subject, Reply: x.reply, Header: x.header, Data: x.data}
	switch err := c.publish(outgoing{m, x.until, sl.drops}); {
	case err == nil:
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return nil, errDropped
	case errors.Is(err, nats.ErrMaxPayload):
		return nil, notRun(newError(ErrInvalid, "the request to %s has %d bytes, more than the server's max_payload of %d",
			x.subject, len(x.data), c.nc.MaxPayload()))
	case errors.Is(err, nats.ErrBadHeaderMsg):
		return nil, notRun(newError(ErrInvalid, "the request to %s has a header whose key is not an HTTP token: %q",
			x.subject, slices.Collect(maps.Keys(x.header))))
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
				failure = s.whyNoAnswer(c, sl, x.subject)
			case m.Subject != x.reply: // a late or a second answer to an earlier call, or the message of probeSlots
				sl.strays = sl.strays || !strings.HasSuffix(m.Subject, "."+probeToken)
				failure = s.whyNoAnswer(c, sl, x.subject)
			case isNoResponders(m):
				return nil, errNoResponders
			case !x.toStream && isPubAck(m): // a stream takes the subject too, and the answer is still to come
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
		limit := (x.until - sl.since).Round(time.Millisecond)
		failure = newError(failure, "no answer from %s within %v: %s", x.subject, limit, failure.Message)
		failure.Details = map[string]string{"correlation_id": parseAddress(x.reply).correlationID()}
	}
	return nil, failure
}

// isNoResponders reports whether m is the server's answer to a message whose subject nobody has subscribed to.
func isNoResponders(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }

// whyNoAnswer returns why the answer to the message that was sent to subject can't come any more, or nil if it may still come.
func (s *Service) whyNoAnswer(c *conn, sl *slot, subject string) *Error {
	noAnswers := s.denials.since(sl.since, toSubscribe+sl.sub.Subject)
	if noAnswers != nil {
		noAnswers.NotRun = false // the message itself may have arrived
		sl.deaf = true
	}
	switch denied := cmp.Or(s.denials.since(sl.since, toPublish+subject), noAnswers); {
	case denied != nil:
		return denied
	case sl.refused.Load():
		sl.deaf = true
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

// A slot waits for the answer to one call at a time. It is a subscription to <inbox>.<slot>.> that is used again and again, so
// that the connection's read loop hands an answer straight to the waiting caller. The number of the call in the reply subject
// distinguishes an answer to this call from a late answer to an earlier one. A nil among the answers makes the caller check
// whether its answer can still come; see whyNoAnswer.
type slot struct {
	sub     *nats.Subscription
	prefix  string // of the reply subjects
	answers chan *nats.Msg
	alarm   *time.Timer // wakes the caller when its time is up
	missed  int         // how many calls ended without an answer, whose late answers may still come and fill the channel
	calls   uint64      // the number of the latest call
	strays  bool        // whether a message came that belongs to no call, so that others may follow and fill the channel
	deaf    bool        // whether the server delivers no answer to the subscription
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
	// If the server has refused a slot a moment ago, there may be as many as it allowed, because a message whose answer can't be
	// heard is better not sent.
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
	if sl.strays || sl.deaf || sl.missed >= maxMissed || len(sl.answers) > 0 {
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
	for {
		noted := c.probing.Load() // refusals that this round deals with
		c.probeSlotsOnce(ctx, denials)
		if c.probing.Add(-noted) == 0 {
			return // no others have come meanwhile
		}
	}
}

func (c *conn) probeSlotsOnce(ctx context.Context, denials *denials) {
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
		return // the connection is lost, and with it the calls
	}
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	for sl, count := range before {
		if now, err := sl.sub.Delivered(); err == nil && now == count && len(sl.answers) < cap(sl.answers) {
			sl.refused.Store(true)
			sl.wake()
			delete(c.slots, sl)
		}
	}
	c.room, c.roomUntil = len(c.slots), clock()+10*time.Second
}

// endSlot ends the slot's subscription.
func (c *conn) endSlot(sl *slot) {
	sl.alarm.Stop()
	_ = sl.sub.Unsubscribe() // fails only on a closed connection
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	delete(c.slots, sl)
}
