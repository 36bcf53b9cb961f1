package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has the pool of connections: how they are made, lost and made again, which one a message takes, and what the server
// has refused. What is sent on a connection goes through publish, which batches it.

// A conn is one connection of the pool, or the carrier's, and its reply slots.
type conn struct {
	nc           *nats.Conn
	js           jetstream.JetStream
	inbox        string                // the prefix of this connection's reply subjects, with the dot at its end
	up           atomic.Bool           // whether it is connected, as far as nats.go's callbacks have said
	first        chan struct{}         // closed when it is connected for the first time
	connectedAt  atomic.Int64          // when it was connected last, by the clock
	lastReported atomic.Pointer[error] // the latest error that nats.go has passed to AsyncErrorCB
	maxPayload   atomic.Int64          // the server's max_payload

	lostAt            atomic.Int64  // when the connection was lost last, by the clock
	drops, reconnects atomic.Uint32 // how often the connection was lost, and how often it was made again

	sendMu  sync.Mutex // guards the next two
	pending []outgoing // messages that the goroutine which added the first of them will publish
	spare   []outgoing // the empty slice that pending becomes next, so that no new one is allocated

	inboxCount atomic.Uint64 // how many newInbox has made
	probing    atomic.Int32  // refusals of a subscription that probeSlots has not dealt with yet; it runs while there are any
	slotsMu    sync.Mutex    // guards the rest
	slots      map[*slot]bool
	free       []*slot       // the slots without a call; the one used last is at the end
	room       int           // how many slots the server allowed when it refused one
	roomUntil  time.Duration // until when that counts, by the clock
}

const maxSlots = 8192 // calls that may wait for their answers on one connection

// connect makes one connection of the pool, or the carrier.
func (s *Service) connect(carrier bool) (_ *conn, err error) {
	c := &conn{slots: map[*slot]bool{}, first: make(chan struct{})}
	opts := nats.GetDefaultOptions()
	opts.Servers, opts.Name = s.cfg.urls, s.id
	opts.MaxReconnect = -1 // no limit
	opts.CustomReconnectDelayCB = func(rounds int) time.Duration { return backoff(rounds, 50*time.Millisecond, 5*time.Second) }
	opts.IgnoreAuthErrorAbort = true // go on reconnecting, because the credentials may be renewed
	opts.PingInterval = 10 * time.Second
	opts.FlusherTimeout = 2 * time.Second // a server that does not read any more counts as gone
	opts.ReconnectOnFlusherError = true
	for _, opt := range s.cfg.nats {
		if err := opt(&opts); err != nil {
			return nil, newError(ErrInvalid, "WithNATS: %v", err)
		}
	}
	if !carrier {
		opts.ReconnectBufSize = -1 // no buffer, because what is in it would be sent after its caller had given up
	}
	// nats.go's own requests use this prefix, too.
	opts.InboxPrefix = cmp.Or(opts.InboxPrefix, strings.TrimSuffix(nats.InboxPrefix, ".")) + "." + s.name
	c.setCallbacks(s, carrier, &opts)
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

// setCallbacks makes nats.go report to c and s what happens to the connection. The callbacks of the user, from WithNATS, are
// called afterwards.
func (c *conn) setCallbacks(s *Service, carrier bool, opts *nats.Options) {
	user := *opts
	opts.DisconnectedErrCB = func(nc *nats.Conn, err error) {
		c.disconnected()
		if !nc.IsClosed() {
			s.log.Warn("disconnected from NATS", "error", err)
		}
		if user.DisconnectedErrCB != nil {
			user.DisconnectedErrCB(nc, err)
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
		if user.ClosedCB != nil {
			user.ClosedCB(nc)
		}
	}
	opts.ConnectedCB = func(nc *nats.Conn) {
		c.connected(nc)
		close(c.first)
		if user.ConnectedCB != nil {
			user.ConnectedCB(nc)
		}
	}
	opts.ReconnectedCB = func(nc *nats.Conn) {
		c.connected(nc)
		c.reconnects.Add(1)
		s.log.Info("reconnected to NATS", "url", nc.ConnectedUrlRedacted())
		if carrier {
			s.carrierIsBack(c, time.Duration(c.lostAt.Load()))
		} else {
			signal(s.entryChanged) // the server may have forgotten the registry entry
		}
		if user.ReconnectedCB != nil {
			user.ReconnectedCB(nc)
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
		subject := cmp.Or(sub, &nats.Subscription{}).Subject
		s.log.Log(context.Background(), level, "NATS reports an error", "subject", subject, "error", err)
		c.lastReported.Store(&err) // after note, because checkDenials relies on that
		if user.AsyncErrorCB != nil {
			user.AsyncErrorCB(nc, sub, err)
		}
	}
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
	c.lostAt.Store(int64(clock()))
	c.drops.Add(1)
	c.wakeSlots()
}

// awaitConnections waits until the connections are up.
func (s *Service) awaitConnections(ctx context.Context, conns ...*conn) error {
	for _, c := range conns {
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

// maxPayload returns the smallest max_payload of the connected servers. Before the first connection it is that of nats-server
// as it comes.
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
	for _, c := range s.allConns() {
		if err := c.flush(ctx); err != nil {
			failure = newError(cmp.Or(asError(ctx.Err()), ErrUnavailable), "no answer from %s: %v", redacted(s.cfg.urls), err)
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

// denials remembers what the server has denied. The server does not answer a message that it denies. It reports the denial with
// the subject, but without the message's reply subject, so that the caller has to look for it here.
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
// denials of what one of them covers. A pattern is toPublish or toSubscribe and a pattern of subjects; the prefix is a part of
// the first token, so that covers can compare them.
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
	for _, c := range s.allConns() { // wait until AsyncErrorCB was called for what LastError knows already
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
