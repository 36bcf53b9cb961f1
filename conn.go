package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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

// This file is the connections: the pool, and request, which sends a message and waits for its one answer. RPC, publishing, the
// records of commands and every compare-and-swap go through it. It is the one place where failures become errors.

// A conn is one connection of the pool and the reply slots on it.
type conn struct {
	nc         *nats.Conn
	js         jetstream.JetStream
	inbox      string        // the subject of the connection's slots, up to and including the dot
	up         atomic.Bool   // as far as nats.go has told
	drops      atomic.Uint32 // how often the connection was lost
	reconnects atomic.Uint32
	told       atomic.Pointer[error] // the latest that nats.go has reported
	limit      atomic.Int64          // the server's max_payload

	sendMu  sync.Mutex // guards the next two
	pending []outgoing // put down to be published by the goroutine that came first
	spare   []outgoing // an empty one that was used before

	inboxes atomic.Uint64 // made so far
	slotsMu sync.Mutex    // guards the rest
	slots   map[*slot]bool
	free    []*slot // those without a call; the one used last comes last
}

const maxSlots = 8192 // calls that may wait for their answers on one connection

func (s *Service) connect() (*conn, error) {
	c := &conn{slots: map[*slot]bool{}}
	c.up.Store(true) // so that nothing but the callbacks below, which run in order, changes it
	opts := nats.GetDefaultOptions()
	opts.Servers = s.cfg.urls
	opts.Name = s.id
	opts.MaxReconnect = -1
	opts.CustomReconnectDelayCB = func(rounds int) time.Duration { return backoff(rounds, 50*time.Millisecond, 5*time.Second) }
	opts.IgnoreAuthErrorAbort = true // credentials may be renewed meanwhile
	opts.PingInterval = 10 * time.Second
	opts.FlusherTimeout = 2 * time.Second // a server that takes nothing any more is as good as gone
	opts.ReconnectOnFlusherError = true
	for _, opt := range s.cfg.nats {
		if err := opt(&opts); err != nil {
			return nil, newError(ErrInvalid, "WithNATS: %v", err)
		}
	}
	opts.ReconnectBufSize = -1
	opts.InboxPrefix = cmp.Or(opts.InboxPrefix, strings.TrimSuffix(nats.InboxPrefix, ".")) + "." + s.name // also for what nats.go asks by itself
	disconnected, connected, reconnected, failed := opts.DisconnectedErrCB, opts.ConnectedCB, opts.ReconnectedCB, opts.AsyncErrorCB
	opts.DisconnectedErrCB = func(nc *nats.Conn, err error) {
		c.disconnected()
		if !nc.IsClosed() {
			s.log.Warn("disconnected from NATS", "error", err)
		}
		if disconnected != nil {
			disconnected(nc, err)
		}
	}
	opts.ConnectedCB = func(nc *nats.Conn) {
		c.connected(nc)
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
		subject := ""
		if sub != nil {
			subject = sub.Subject
		}
		s.log.Error("NATS reports an error", "subject", subject, "error", err)
		if errors.Is(err, nats.ErrPermissionViolation) {
			s.denied.note(err, nc.Opts.InboxPrefix)
			c.wakeSlots()
		}
		c.told.Store(&err)
		if failed != nil {
			failed(nc, sub, err)
		}
	}
	nc, err := opts.Connect()
	if err != nil {
		return nil, newError(ErrUnavailable, "connecting to %s: %v", strings.Join(redacted(opts.Servers), ", "), err)
	}
	c.nc = nc
	c.js, _ = jetstream.New(nc) // it fails only on options
	c.limit.Store(nc.MaxPayload())
	c.inbox = opts.InboxPrefix + "." + rand.Text()[:connectionToken] + "."
	return c, nil
}

func redacted(urls []string) []string {
	out := slices.Clone(urls)
	for i := range out {
		if u, err := url.Parse(out[i]); err == nil {
			out[i] = u.Redacted()
		}
	}
	return out
}

func (c *conn) connected(nc *nats.Conn) {
	c.limit.Store(nc.MaxPayload())
	c.up.Store(true)
}

func (c *conn) disconnected() {
	c.up.Store(false)
	c.drops.Add(1)
	c.wakeSlots()
}

// pick returns the next connection that is up, nil if all are down.
func (s *Service) pick() *conn {
	n := s.next.Add(1)
	for i := range uint32(len(s.conns)) {
		if c := s.conns[(n+i)%uint32(len(s.conns))]; c.up.Load() {
			return c
		}
	}
	return nil
}

// disconnectedError is what a call gets when no connection is up.
func (s *Service) disconnectedError() *Error {
	if s.base.Err() != nil {
		return notRun(s.closedError())
	}
	return notRun(newError(ErrUnavailable, "no connection to %s", strings.Join(redacted(s.cfg.urls), ", ")))
}

// An exchange is what request sends, and the reply subject that it was given.
type exchange struct {
	subject     string
	header      nats.Header
	data        []byte
	correlation string        // "" for one of its own
	until       time.Duration // by the clock; what is left then is told to the handler
	on          *conn         // to send it on; nil for any that is up
	reply       string
	sent        bool
}

// within gives x the time that ctx has, most at the most.
func (x *exchange) within(ctx context.Context, most time.Duration) *exchange {
	x.until = clock() + min(timeLeft(ctx, most), most)
	return x
}

// timeLeft is what ctx gives, or if it has no deadline, usual.
func timeLeft(ctx context.Context, usual time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		usual = time.Until(deadline)
	}
	return min(usual, maxBudget)
}

const maxBudget = 365 * 24 * time.Hour // a deadline farther away has no room in a reply subject, or on the clock

// errNobody is request's answer if no one listens on the subject.
var errNobody = notRun(newError(ErrUnavailable, "nobody listens"))

// errDropped says that the connection was lost before anything was written.
var errDropped = &Error{}

// persist makes attempts, within the time that ctx gives, until one succeeds or may not be followed by another. It releases buf,
// which holds x.data, if no attempt can still wait to be published.
func (s *Service) persist(ctx context.Context, x *exchange, cfg *callConfig, buf *packer, attempt func() (answer *nats.Msg, failure *Error, again bool)) (*nats.Msg, *Error) {
	policy := cfg.policy()
	end := clock() + timeLeft(ctx, s.cfg.timeout)
	mayHaveRun := false
	var last *Error
	for n := 1; ; n++ {
		x.until = end
		if cfg.idempotent {
			now := clock()
			x.until = now + min(end-now, policy.AttemptTimeout)
		}
		answer, failure, again := attempt()
		if failure == nil {
			if n == 1 {
				buf.release()
			}
			return answer, nil
		}
		mayHaveRun = mayHaveRun || !failure.NotRun
		failure.NotRun = !mayHaveRun
		if !again || n >= policy.Attempts {
			if failure.Source == "" && (failure.Code == ErrTimeout.Code || failure.Code == ErrCanceled.Code) {
				failure.Cause = last // tells more than that the time was up
			}
			return nil, failure
		}
		if last == nil || !failure.NotRun || ctx.Err() == nil && clock() < end { // else the end cut it short, so it tells less than the one before
			last = failure
		}
		sleep(ctx, min(backoff(n, policy.Backoff, policy.MaxBackoff), end-clock()))
		if err := ctx.Err(); err != nil || clock() >= end {
			given := newError(ErrTimeout, "gave up on %s after %d attempts", x.subject, n)
			if errors.Is(err, context.Canceled) {
				given.Code = ErrCanceled.Code
			}
			given.NotRun, given.Cause = failure.NotRun, last
			return nil, given
		}
	}
}

// request publishes x and waits for its answer, until x.until at most. Whatever goes wrong becomes an Error here.
func (s *Service) request(ctx context.Context, x *exchange) (*nats.Msg, *Error) {
	if err := ctx.Err(); err != nil {
		return nil, notRun(asError(err))
	}
	begin := clock()
	if x.until <= begin {
		return nil, notRun(newError(ErrTimeout, "no time left for %s", x.subject))
	}
	x.sent = false
	for range s.conns {
		c := x.on
		if c == nil {
			if c = s.pick(); c == nil {
				break
			}
		}
		var answer *nats.Msg
		sl, failure := c.slot()
		if failure == nil {
			sl.since = begin
			answer, failure = s.exchange(ctx, c, sl, x)
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

func (s *Service) exchange(ctx context.Context, c *conn, sl *slot, x *exchange) (*nats.Msg, *Error) {
	sl.calls += 1 + mrand.Uint64N(1<<20) // no one can tell the next from the last
	var buf [256]byte
	b := append(buf[:0], sl.prefix...)
	b = strconv.AppendUint(b, sl.calls, 36)
	if x.correlation != "" {
		b = append(append(b, '-'), x.correlation...)
	}
	b = strconv.AppendInt(append(b, '.'), max((x.until-clock()).Milliseconds(), 1), 10)
	x.reply = string(b)
	sl.drops = c.drops.Load()
	if !c.up.Load() {
		return nil, errDropped
	}
	sl.await(x.until)

	switch err := c.publish(outgoing{x.subject, x.reply, x.header, x.data, x.until, sl.drops}); {
	case err == nil:
		x.sent = true
	case errors.Is(err, nats.ErrReconnectBufExceeded):
		return nil, errDropped
	case errors.Is(err, nats.ErrMaxPayload):
		return nil, notRun(newError(ErrInvalid, "the request to %s has %d bytes, more than the server's max_payload of %d", x.subject, len(x.data), c.nc.MaxPayload()))
	case errors.Is(err, nats.ErrBadHeaderMsg):
		return nil, notRun(newError(ErrInvalid, "the request to %s has a header whose key is no HTTP token: %q", x.subject, slices.Collect(maps.Keys(x.header))))
	case errors.Is(err, nats.ErrConnectionClosed):
		return nil, s.disconnectedError()
	default: // part of it may have been written
		return nil, newError(ErrUnavailable, "publishing to %s: %v", x.subject, err)
	}

	for {
		var m *nats.Msg
		select {
		case m = <-sl.answers:
		case <-ctx.Done():
			return nil, unanswered(asError(ctx.Err()), sl, x)
		}
		if m != nil && m.Subject == x.reply {
			if isNobody(m) {
				return nil, errNobody
			}
			return m, nil
		}
		if failure := s.over(c, sl, x.subject); failure != nil {
			return nil, unanswered(failure, sl, x)
		}
	}
}

// isNobody tells whether m is the server's answer to a message on whose subject no one listens.
func isNobody(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }

// over tells why no answer to what was sent to subject will come to a slot that was woken, nil if one may.
func (s *Service) over(c *conn, sl *slot, subject string) *Error {
	denied := s.denied.since(sl.since, toPublish+subject)
	if denied == nil {
		if denied = s.denied.since(sl.since, toSubscribe+sl.sub.Subject); denied != nil {
			denied.NotRun = false
			sl.missed = maxMissed - 1 // it hears nothing
		}
	}
	switch {
	case denied != nil:
		return denied
	case s.base.Err() != nil:
		return s.closedError()
	case c.drops.Load() != sl.drops:
		return newError(ErrUnavailable, "the connection was lost")
	case clock() >= sl.until:
		return newError(ErrTimeout, "%v", context.DeadlineExceeded)
	}
	return nil
}

// unanswered adds to the error of a call that may have run what it takes to find it in the logs of both sides.
func unanswered(e *Error, sl *slot, x *exchange) *Error {
	if e.Code == ErrDenied.Code {
		return e
	}
	e.Message = fmt.Sprintf("no answer from %s within %v: %s", x.subject, (x.until - sl.since).Round(time.Millisecond), e.Message)
	e.Details = map[string]string{"correlation_id": parseAddress(x.reply).correlationID()}
	return e
}

// An address is what a reply subject says about its caller:
//
//	<inbox prefix>.<calling service>.<connection>.<slot>.<call>[-<correlation id>].<budget in ms>
//
// so that deadline, caller and correlation id need no header. It is the caller's own account, and proves nothing.
type address struct {
	service string
	call    string        // <connection>.<slot>.<call>[-<correlation id>]
	budget  time.Duration // 0 for a caller that isn't aegis: all is unknown then
}

const connectionToken = 12 // characters: 60 random bits

func parseAddress(reply string) (a address) {
	last := max(strings.LastIndexByte(reply, '.'), 0)
	ms, err := strconv.ParseUint(strings.TrimPrefix(reply[last:], "."), 10, 40)
	if err != nil || ms == 0 || last == 0 {
		return a
	}
	first := last
	for range 3 {
		first = strings.LastIndexByte(reply[:max(first, 0)], '.')
	}
	service := reply[:max(first, 0)]
	service = service[strings.LastIndexByte(service, '.')+1:]
	call := reply[first+1 : last]
	if len(call) <= connectionToken || call[connectionToken] != '.' || !isName(service, maxService) {
		return a
	}
	return address{service, call, time.Duration(ms) * time.Millisecond}
}

func (a address) correlationID() string {
	if _, id, ok := strings.Cut(a.call, "-"); ok {
		return id
	}
	return strings.ReplaceAll(a.call, ".", "-")
}

// A slot waits for the answer to one call at a time. It is a subscription that is kept and used again, to
// <inbox>.<slot>.>, so that the connection's read loop hands an answer straight to its caller; the call's number in the reply
// subject tells it from a late one to an earlier call. A nil among the answers tells the caller to look whether its time is up
// or its connection was lost.
type slot struct {
	sub     *nats.Subscription
	prefix  string
	answers chan *nats.Msg
	alarm   *time.Timer // wakes the call whose time is up
	missed  int         // calls that were given up; their answers may still come, and fill answers
	calls   uint64

	// Of the present call:
	since, until time.Duration
	drops        uint32 // of the connection, when it began
}

// await has the slot woken at that time.
func (sl *slot) await(until time.Duration) {
	sl.until = until
	sl.alarm.Reset(until - clock())
}

// wake has the one who reads the answers look why.
func (sl *slot) wake() {
	select {
	case sl.answers <- nil:
	default: // then there is something to wake it already
	}
}

func (c *conn) wakeSlots() {
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	for sl := range c.slots {
		sl.wake()
	}
}

// slot takes the free slot that was used last, or makes one.
func (c *conn) slot() (*slot, *Error) {
	c.slotsMu.Lock()
	n := len(c.free)
	if n == 0 {
		c.slotsMu.Unlock()
		return c.newSlot(c.newInbox()+".", 4*maxMissed)
	}
	sl := c.free[n-1]
	c.free = c.free[:n-1]
	c.slotsMu.Unlock()
	for len(sl.answers) > 0 { // late ones
		<-sl.answers
	}
	return sl, nil
}

// newSlot makes a slot for what comes under prefix, with room for so many messages.
func (c *conn) newSlot(prefix string, room int) (*slot, *Error) {
	sl := &slot{prefix: prefix, calls: mrand.Uint64N(1 << 32), answers: make(chan *nats.Msg, room)}
	sl.alarm = time.AfterFunc(time.Hour, sl.wake)
	c.slotsMu.Lock()
	full := len(c.slots) >= maxSlots
	if !full {
		c.slots[sl] = true
	}
	c.slotsMu.Unlock()
	if full {
		return nil, notRun(newError(ErrOverloaded, "%d calls wait for their answers: try later, or use WithPool for more connections", maxSlots))
	}
	subject := prefix
	if strings.HasSuffix(prefix, ".") {
		subject += ">"
	}
	var err error
	if sl.sub, err = c.nc.ChanSubscribe(subject, sl.answers); err != nil { // the connection is closed
		c.endSlot(sl)
		return nil, errDropped
	}
	return sl, nil
}

// newInbox is a subject for answers that no one else uses.
func (c *conn) newInbox() string { return c.inbox + strconv.FormatUint(c.inboxes.Add(1), 10) }

const maxMissed = 8

// release puts a slot back, or ends it if many late answers to it may be on their way.
func (c *conn) release(sl *slot, answered bool) {
	sl.alarm.Stop()
	if !answered {
		sl.missed++
	}
	if sl.missed == maxMissed {
		c.endSlot(sl)
		return
	}
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	c.free = append(c.free, sl)
}

func (c *conn) endSlot(sl *slot) {
	sl.alarm.Stop()
	_ = sl.sub.Unsubscribe() // fails only on a closed connection
	c.slotsMu.Lock()
	defer c.slotsMu.Unlock()
	delete(c.slots, sl)
}

// An outgoing message. It is not sent any more once clock passes until, or the connection was lost since.
type outgoing struct {
	subject, reply string
	header         nats.Header
	data           []byte
	until          time.Duration
	drops          uint32
}

// publish sends m, together with what other goroutines publish at the same time. nats.go would write to the socket whenever
// one of them goes on to wait for its answer; so the first lets the others run, then hands over all that they have put down.
// That makes some 50 messages a write where there were 2, and costs a lone caller nothing. The error is m's own if it was the
// first, else nil: what can still fail then fails with the connection.
func (c *conn) publish(m outgoing) (err error) {
	if !m.surelyFits(c.limit.Load()) {
		return c.write(m)
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
		if failure := c.write(m); i == 0 {
			err = failure
		}
	}
	clear(batch)
	c.sendMu.Lock()
	c.spare = batch[:0]
	c.sendMu.Unlock()
	return err
}

// surelyFits tells that nats.go won't turn m down, be it for its size or a header's key.
func (m *outgoing) surelyFits(limit int64) bool {
	for key := range m.header {
		if !isToken(key, 128) {
			return false
		}
	}
	return messageSize(m.header, m.data)+64 <= limit
}

// messageSize is about what the server compares with its max_payload.
func messageSize(h nats.Header, data []byte) int64 {
	size := len(data)
	for key, values := range h {
		for _, v := range values {
			size += len(key) + len(v) + 4
		}
	}
	return int64(size)
}

func (c *conn) write(m outgoing) error {
	return c.nc.PublishMsg(&nats.Msg{Subject: m.subject, Reply: m.reply, Header: m.header, Data: m.data})
}

// flush waits until the servers have processed what was sent on every connection.
func (s *Service) flush(ctx context.Context) error {
	var lost error
	for _, c := range s.conns {
		if err := c.flush(ctx); err != nil {
			lost = newError(ErrUnavailable, "no answer from %s: %v", strings.Join(redacted(s.cfg.urls), ", "), err)
		}
	}
	return lost
}

func (c *conn) flush(ctx context.Context) error {
	ctx, cancel := withDeadline(ctx, 5*time.Second)
	defer cancel()
	if !c.up.Load() || !c.nc.IsConnected() { // it would wait for the connection to come back; losing it now ends the wait
		return nats.ErrDisconnected
	}
	return c.nc.FlushWithContext(ctx)
}

// notify publishes what no one answers. It may be lost.
func (s *Service) notify(subject string, data []byte) {
	if c := s.pick(); c != nil {
		_ = c.nc.Publish(subject, data)
	}
}

// denials are what the server has said that it doesn't allow. It doesn't say so to what was denied, but by the way.
type denials struct {
	mu     sync.Mutex                        // guards the rest
	latest map[string]time.Duration          // when that was, by what was denied: toPublish or toSubscribe, and the subject
	asking map[*context.CancelCauseFunc]bool // see asking
}

const (
	toPublish   = "publish to "
	toSubscribe = "subscribe to "
	maxDenials  = 256
)

var denialPattern = regexp.MustCompile(`(Publish|Subscription) to "([^"]+)"`)

func (d *denials) note(err error, inbox string) {
	m := denialPattern.FindStringSubmatch(err.Error())
	if m == nil {
		return
	}
	what := toPublish + m[2]
	if m[1] == "Subscription" {
		what = toSubscribe + m[2]
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.latest == nil || len(d.latest) >= maxDenials {
		d.latest = map[string]time.Duration{}
	}
	d.latest[what] = clock()
	if covers(toPublish+"$JS.>", what) || covers(toSubscribe+inbox+".>", what) {
		for cancel := range d.asking {
			(*cancel)(deniedError(what))
		}
	}
}

// since is a denial of what one of these patterns covers, of anything if there is none, at that time or later.
func (d *denials) since(begin time.Duration, patterns ...string) *Error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for what, at := range d.latest {
		if at >= begin && (len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool { return covers(p, what) })) {
			return deniedError(what)
		}
	}
	return nil
}

func deniedError(what string) *Error {
	return notRun(newError(ErrDenied, "the server's permissions don't allow to %s", what))
}

// asking is for what nats.go asks JetStream by itself: a ctx that ends, with the denial for its cause, when the server denies such
// a question or its answer.
func (s *Service) asking(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.denied.mu.Lock()
	defer s.denied.mu.Unlock()
	s.denied.asking[&cancel] = true
	return ctx, func() {
		cancel(nil)
		s.denied.mu.Lock()
		defer s.denied.mu.Unlock()
		delete(s.denied.asking, &cancel)
	}
}

// probe makes sure that the server tells, before allowed returns, if the service may not publish what it will publish later. It
// leaves no trace: the messages are for no stream, and ask for no answer.
func (s *Service) probe(subjects ...string) {
	for _, subject := range subjects {
		if c := s.pick(); c != nil {
			_ = c.nc.PublishMsg(&nats.Msg{Subject: subject, Header: nats.Header{jetstream.ExpectedStreamHeader: {"none"}}})
		}
	}
}

// allowed waits until the servers have processed all that was sent, and tells whether they have denied anything since begin.
func (s *Service) allowed(ctx context.Context, begin time.Duration) error {
	if err := s.flush(ctx); err != nil {
		return err
	}
	for _, c := range s.conns { // nats.go reports errors a moment later
		last := c.nc.LastError()
		for end := clock() + time.Second; errors.Is(last, nats.ErrPermissionViolation) && clock() < end; time.Sleep(time.Millisecond) {
			if told := c.told.Load(); told != nil && *told == last {
				break
			}
		}
	}
	return s.denied.since(begin).orNil()
}

// clock is monotonic time.
func clock() time.Duration { return time.Since(clockStart) }

var clockStart = time.Now()

// backoff is a random pause between 0 and first·2ⁿ⁻¹, at most the longest.
func backoff(n int, first, longest time.Duration) time.Duration {
	d := longest
	if n = max(n, 1); n < 64 && first <= longest>>(n-1) {
		d = first << (n - 1)
	}
	return mrand.N(d + 1)
}

// sleep pauses, unless ctx ends before.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// withDeadline is ctx, which ends after d if it has no deadline of its own.
func withDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
}
