// Package aegis is a service kit on NATS: typed RPC over a pool of connections, with deadlines, typed errors and retries; durable
// events on JetStream, with dead letters; tracked commands, with one outcome each; leader election and discovery; metrics.
//
// # Usage
//
// A [Service] is made by [New], is a client at once, and serves what was given to [Handle], [Subscribe] and [HandleCommand] from
// [Service.Start] (or [Service.Run]) on:
//
//	svc, err := aegis.New("order-service")
//	aegis.Handle(svc, "create_order", func(ctx context.Context, o Order) (Receipt, error) { … })
//	aegis.Subscribe(svc, "payment.*", func(ctx context.Context, e aegis.Event[Payment]) error { … })
//	aegis.HandleCommand(svc, "rebalance", func(ctx context.Context, c *aegis.Command[Portfolio]) (Report, error) { … })
//	svc.Run(ctx)
//
//	receipt, err := aegis.Call[Order, Receipt](ctx, client, "order-service", "create_order", order)
//	err = aegis.Publish(ctx, client, "payment", "captured", payment)
//	job, err := aegis.SendCommand[Portfolio, Report](ctx, client, "order-service", "rebalance", portfolio)
//
// The payload of a message is the encoded value and nothing else, so that any NATS client can take part:
//
//	nats req rpc.order-service.create_order '{"sku":"x"}'
//
// # Delivery
//
// A call runs at most once. What may have run is never sent again behind the caller's back: [Retry] and [Sticky] resend only
// what certainly did not reach a handler, and an [Error] says so in NotRun; [Idempotent] lifts that. Every request that
// arrives is answered, be it with an error, unless its caller has stopped waiting.
//
// An event is handled at least once by each service that subscribes to it. [Publish] returns when the server has stored it; it is
// acknowledged when its handler has returned nil, or when it is stored as a dead letter.
//
// A command has one outcome, which is stored, and once it has, its handler is not called again. Until then it may be called more
// than once, after an error or a crash: see [HandleCommand].
//
// An [Exclusive] handler runs in one instance only, the leader. There is never more than one; [Term] is its fencing token.
//
// # Concurrency
//
// All functions and methods may be called from several goroutines at once. Handlers run concurrently, each method's up to its
// own limit ([WithConcurrency], [Concurrency]); as many requests again may wait for their turn, and the rest is refused with
// [ErrOverloaded]. Events and commands wait in the server. A handler's ctx ends with its caller's deadline ([Deadline], for an
// event or a command), when its caller cancels, and when Stop runs out of time.
//
// # Shutdown
//
// [Service.Stop] takes no more work, lets the handlers that run finish, gives back to the server the events and commands that
// there is no time for, hands the leadership over, leaves the registry, and closes the connections. It leaves no goroutine behind
// but those of handlers that ignore their ctx.
//
// # Observation
//
// [Service.Stats] counts what becomes of every request, event, command and call; [Service.Handler] serves that to Prometheus, with
// probes of health. Started services answer the nats tool (nats micro ls, info, stats, ping). A message's correlation id is in each
// log line about it, and [CorrelationID] for the handler's own; the W3C trace context travels from what comes in to what goes out.
package aegis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A Service is one instance of a named service: a pool of connections to NATS, its handlers, and the calls that it makes.
type Service struct {
	name, id string
	cfg      config
	log      *slog.Logger
	conns    []*conn
	next     atomic.Uint32    // the connection that the last call took
	breakers lookup[*breaker] // by service
	calls    lookup[*meter]   // by <service>.<method>
	cancels  cancels
	denied   denials

	elections   lookup[*watch[claim]] // by <service>.<group>
	directories lookup[*directory]    // by service
	exclusive   *candidate            // for the exclusive handlers; nil without any
	acting      atomic.Int32          // functions of Lead that run
	campaigns   sync.WaitGroup        // candidates

	since   time.Time       // when it was made
	unwell  atomic.Bool     // a health check fails
	judging sync.Mutex      // one judge at a time
	news    chan struct{}   // to beat: the entry has changed
	gone    context.Context // ends beat
	goAway  context.CancelFunc
	beating sync.WaitGroup // beat

	quitting  context.Context // ends when Stop begins
	quit      context.CancelFunc
	base      context.Context // parent of every handler's ctx: ends when Stop's time is up
	cancel    context.CancelFunc
	tasks     sync.WaitGroup // goroutines that end with base
	ready     atomic.Bool    // Start has succeeded
	draining  atomic.Bool    // requests that wait are refused
	returning atomic.Int32   // commands that are being given back
	done      chan struct{}  // closed when Stop is through

	mu         sync.Mutex // guards the rest
	state      state
	endpoints  map[string]*endpoint // by kind and name
	candidates map[*candidate]bool
	enrolled   bool                 // the registry may have an entry
	own        []*nats.Subscription // those that belong to no endpoint, and end with Stop's beginning
}

type state int

const (
	created state = iota
	started
	stopping
)

// An Option configures a [Service] in [New].
type Option func(*config)

type config struct {
	urls        []string
	nats        []nats.Option
	pool        int
	id, version string
	codec       Codec
	logger      *slog.Logger
	timeout     time.Duration
	concurrency int
	replicas    int
	breaker     BreakerPolicy
	failover    FailoverPolicy
	heartbeat   time.Duration
	metadata    map[string]string
	checks      []*healthCheck
	middleware  []Middleware
	err         error // of the first option that was out of range
}

func (c *config) check(ok bool, format string, args ...any) {
	if !ok && c.err == nil {
		c.err = newError(ErrInvalid, format, args...)
	}
}

// WithURL names the servers to connect to, tried in random order. Given again, it replaces the earlier ones. The default is
// $NATS_URL (several separated by commas), else nats://127.0.0.1:4222. An empty or unparsable URL is invalid.
func WithURL(urls ...string) Option {
	return func(c *config) {
		c.check(len(urls) > 0, "WithURL(): no URL given")
		for _, u := range urls {
			full := u
			if !strings.Contains(u, "://") {
				full = "nats://" + u
			}
			p, err := url.Parse(full)
			c.check(err == nil && p.Host != "", "WithURL(%q): not a server's URL, such as nats://host:4222", u)
		}
		c.urls = urls
	}
}

// WithNATS adds options of nats.go to every connection: credentials, TLS, an in-process server, handlers of events. They win
// over what aegis sets (its own event handlers run first), except that nothing is ever buffered while disconnected: it would
// be sent after its caller had given up.
func WithNATS(opts ...nats.Option) Option {
	return func(c *config) { c.nats = append(c.nats, opts...) }
}

// WithPool sets the number of connections, 1 to 64. The default is 2. Each carries up to 8192 calls at a time; what exceeds that
// fails at once with [ErrOverloaded].
func WithPool(size int) Option {
	return func(c *config) {
		c.check(size >= 1 && size <= 64, "WithPool(%d): want 1 to 64 connections", size)
		c.pool = size
	}
}

// WithID names this instance; calls can be addressed to it by [ToInstance]. It must be unique among the instances of the
// service, of letters, digits, - and _, at most 128 of them. The default is the service's name and 8 random hex digits.
func WithID(id string) Option {
	return func(c *config) {
		c.check(isToken(id, maxInstance), "WithID(%q): want 1 to 128 of a-z, A-Z, 0-9, - and _", id)
		c.id = id
	}
}

// WithVersion sets the service's version, x.y.z. The default is 0.0.0.
func WithVersion(version string) Option {
	return func(c *config) {
		c.check(versionPattern.MatchString(version), "WithVersion(%q): want x.y.z, such as 1.2.0", version)
		c.version = version
	}
}

// WithCodec sets how requests are encoded. The default is [MsgPack]. Requests in MessagePack and JSON are understood in any
// case, and a request is answered in its own format.
func WithCodec(codec Codec) Option {
	return func(c *config) {
		c.check(codec != nil, "WithCodec(nil): want a codec, such as aegis.JSON")
		c.codec = codec
	}
}

// WithLogger sets where the service logs to. The default is [slog.Default].
func WithLogger(l *slog.Logger) Option {
	return func(c *config) {
		c.check(l != nil, "WithLogger(nil): want a logger, such as slog.New(slog.DiscardHandler) for none")
		c.logger = l
	}
}

// WithTimeout sets how long a call may take whose ctx has no deadline, and how long a handler may run for a caller that tells
// no deadline (a plain NATS client). It must be positive. The default is 5 s.
func WithTimeout(d time.Duration) Option {
	return func(c *config) {
		c.check(d > 0, "WithTimeout(%v): want more than 0", d)
		c.timeout = d
	}
}

// WithConcurrency sets how many requests each method of this instance handles at once, unless its own [Concurrency] says
// otherwise: 1 or more. The default is 1024.
func WithConcurrency(n int) Option {
	return func(c *config) {
		c.check(n >= 1 && n <= maxConcurrency, "WithConcurrency(%d): want 1 to %d", n, maxConcurrency)
		c.concurrency = n
	}
}

// WithReplicas sets on how many servers of a cluster each stream is kept that the service makes, 1 to 5. The default is 1. It
// has no effect on streams that exist.
func WithReplicas(n int) Option {
	return func(c *config) {
		c.check(n >= 1 && n <= 5, "WithReplicas(%d): want 1 to 5", n)
		c.replicas = n
	}
}

// WithBreaker puts a circuit breaker before each service that is called. There is none by default.
func WithBreaker(p BreakerPolicy) Option {
	return func(c *config) {
		c.check(p.Failures >= 0 && p.Cooldown >= 0, "WithBreaker(%+v): negative", p)
		c.breaker = BreakerPolicy{Failures: cmp.Or(p.Failures, 5), Cooldown: cmp.Or(p.Cooldown, 5*time.Second)}
	}
}

// WithMiddleware wraps every handler of the service. The first one given is the outermost.
func WithMiddleware(mw ...Middleware) Option {
	return func(c *config) {
		c.check(!slices.ContainsFunc(mw, func(m Middleware) bool { return m == nil }), "WithMiddleware(nil): want a function")
		c.middleware = append(c.middleware, mw...)
	}
}

// A HandlerOption configures one handler.
type HandlerOption func(*handlerConfig)

type handlerConfig struct {
	kind               string // of message
	concurrency        int
	attempts           int
	backoff, maxPause  time.Duration
	deadline           time.Duration
	durable            string
	broadcast, replays bool
	exclusive          bool
	err                error // of the first option that was out of range
}

func (c *handlerConfig) check(ok bool, format string, args ...any) {
	if !ok && c.err == nil {
		c.err = newError(ErrInvalid, format, args...)
	}
}

// Concurrency sets how many messages the handler works on at once, 1 or more, in each instance. The default is that of
// [WithConcurrency], for handlers that wait for something; one that computes is best given about as many as there are CPUs, so
// that what is too much is refused early. Events are handled in the order in which they were stored if it is 1, by all instances
// together: one waits until the one before it is done with, retries included.
func Concurrency(n int) HandlerOption {
	return func(c *handlerConfig) {
		c.check(n >= 1 && n <= maxConcurrency, "Concurrency(%d): want 1 to %d", n, maxConcurrency)
		c.concurrency = n
	}
}

// Attempts sets how often an event or a command is tried, 1 or more in all, until it is set aside as a dead letter. The default
// is 5 for events, 3 for commands.
func Attempts(n int) HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind != kindRPC, "Attempts(%d): a request is tried once; see Retry for its caller", n)
		c.check(n >= 1, "Attempts(%d): want 1 or more", n)
		c.attempts = n
	}
}

// Backoff sets the pause after a failed attempt: random between 0 and first, doubled after each further one, at most max.
// Both must be positive, and first no longer than max. The default is Backoff(500*time.Millisecond, time.Minute).
func Backoff(first, max time.Duration) HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind != kindRPC, "Backoff(%v, %v): a request is tried once; see Retry for its caller", first, max)
		c.check(first > 0 && first <= max, "Backoff(%v, %v): want 0 < first <= max", first, max)
		c.backoff, c.maxPause = first, max
	}
}

// Deadline sets how long one attempt at an event or a command may take until its ctx ends: more than 0. The default is 5 minutes.
// (The deadline of a request is its caller's.)
func Deadline(d time.Duration) HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind != kindRPC, "Deadline(%v): the deadline of a request is its caller's", d)
		c.check(d > 0, "Deadline(%v): want more than 0", d)
		c.deadline = d
	}
}

const maxConcurrency = 1 << 20

const maxService, maxInstance = 64, 128 // characters

var versionPattern = regexp.MustCompile(`^(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}$`) // what nats micro accepts

// New makes an instance of the service called name ([A-Za-z][A-Za-z0-9_-]*, at most 64 characters) and connects it. It blocks
// until every connection of the pool stands, each for at most nats.go's connect timeout (2 s a server).
//
// Errors: [ErrInvalid] for a name or an option that is out of range, [ErrUnavailable] if the servers can't be reached or turn
// the connection down. Use [Service.Stop] to close it.
func New(name string, opts ...Option) (*Service, error) {
	cfg := config{
		pool:        2,
		version:     "0.0.0",
		codec:       MsgPack,
		timeout:     5 * time.Second,
		concurrency: 1024,
		replicas:    1,
		failover:    Balanced,
		heartbeat:   10 * time.Second,
	}
	if env := os.Getenv("NATS_URL"); env != "" {
		WithURL(strings.Split(env, ",")...)(&cfg)
		if cfg.err != nil {
			cfg.err = newError(ErrInvalid, "$NATS_URL: %v", cfg.err)
		}
	} else {
		cfg.urls = []string{nats.DefaultURL}
	}
	for _, opt := range opts {
		opt(&cfg)
	}
	if !isName(name, maxService) {
		return nil, newError(ErrInvalid, "service name %q: want a letter, then letters, digits, - and _, at most 64", name)
	}
	if cfg.err != nil {
		return nil, cfg.err
	}
	id := cmp.Or(cfg.id, fmt.Sprintf("%s-%08x", name, mrand.Uint32()))
	s := &Service{
		name:       name,
		id:         id,
		cfg:        cfg,
		log:        cmp.Or(cfg.logger, slog.Default()).With("service", name, "instance", id),
		endpoints:  map[string]*endpoint{},
		candidates: map[*candidate]bool{},
		news:       make(chan struct{}, 1),
		done:       make(chan struct{}),
		since:      time.Now(),
	}
	s.calls.most = 1024
	s.cancels.watch = map[string]context.CancelFunc{}
	s.denied.asking = map[*context.CancelCauseFunc]bool{}
	s.quitting, s.quit = context.WithCancel(context.Background())
	s.base, s.cancel = context.WithCancel(context.Background())
	s.gone, s.goAway = context.WithCancel(context.Background())
	for range cfg.pool {
		c, err := s.connect()
		if err != nil {
			s.close()
			return nil, err
		}
		s.conns = append(s.conns, c)
	}
	return s, nil
}

// Name is the service's name.
func (s *Service) Name() string { return s.name }

// ID is the instance's id.
func (s *Service) ID() string { return s.id }

// Conn is a connection of the pool, for what aegis doesn't do. The service goes on using it: don't close or drain it.
func (s *Service) Conn() *nats.Conn {
	return cmp.Or(s.pick(), s.conns[0]).nc
}

// Start begins to serve: it runs the health checks once, makes what [Subscribe] needs on the server, subscribes, and enters the
// instance into the registry. When it returns, every server of the pool knows the handlers; more may be added later. An instance
// with [Exclusive] handlers then campaigns to lead, which takes the Lease of its policy ([WithFailover]) where nobody led before.
//
// It fails with [ErrClosed] after Stop, [ErrInvalid] if the service was started already or a stream, bucket or consumer that exists
// can't be used, [ErrUnavailable] if the server can't be reached, or its JetStream, where handlers need it, [ErrDenied] if the
// server's permissions don't allow what the service does. (Without JetStream the instance serves plain RPC, but isn't in the
// registry.) A service whose Start failed can only be stopped.
func (s *Service) Start(ctx context.Context) error {
	s.mu.Lock()
	if s.state != created {
		defer s.mu.Unlock()
		return s.stateErrorLocked("Start")
	}
	s.state = started
	s.mu.Unlock()
	begin := clock()

	select {
	case <-s.checkHealth():
	case <-time.After(s.cfg.heartbeat):
		s.checkHealth() // what hangs has failed
	case <-ctx.Done():
	}
	for _, e := range s.handlers() {
		if err := e.open(ctx); err != nil {
			return err
		}
	}
	if err := s.subscribeOwn(); err != nil {
		return err
	}
	if err := s.allowed(ctx, begin); err != nil {
		return err
	}
	if failure := s.enroll(ctx); failure != nil {
		return failure
	}
	if err := s.runForLeader(ctx); err != nil {
		return err
	}
	if err := s.allowed(ctx, begin); err != nil {
		return err
	}
	s.ready.Store(true)
	return nil
}

// task runs fn on a goroutine that Stop waits for, unless that has begun. fn ends when base does.
func (s *Service) task(fn func()) (ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == stopping {
		return false
	}
	s.tasks.Go(fn)
	return true
}

func (s *Service) handlers() []*endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.endpoints))
}

func (s *Service) stateErrorLocked(verb string) error {
	switch s.state {
	case stopping:
		return newError(ErrClosed, "%s: service %s was stopped", verb, s.name)
	case started:
		return newError(ErrInvalid, "%s: service %s was started already", verb, s.name)
	}
	return nil
}

// Run serves until ctx ends: Start, wait, Stop. Stop gets 30 s to finish what runs; it is called too when Start fails.
func (s *Service) Run(ctx context.Context) error {
	err := s.Start(ctx)
	if err == nil {
		select {
		case <-ctx.Done():
		case <-s.done: // stopped by someone else
		}
	} else if ctx.Err() != nil {
		err = nil // told to end before it had begun
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	return errors.Join(err, s.Stop(ctx))
}

const (
	cancelGrace   = 200 * time.Millisecond // for handlers to heed the end of their ctx, once Stop's has ended
	returnTimeout = 5 * time.Second        // to note what is given back, before that
)

// Stop takes no more requests, waits until those that have arrived are answered, releases the leadership, leaves the registry,
// flushes, and closes the connections; calls that still wait for an answer then fail with [ErrClosed]. The functions of
// [Service.Lead] are told at its beginning. When ctx ends before that, requests that haven't begun are
// refused, events are given back without using up an attempt, the ctx of the handlers that run ends, and Stop returns 0.2 s
// later with [ErrTimeout] saying how many are left; what is given back may take it up to 5 s more, and 2 s in a cluster. While the
// server can't be reached it closes what is local and returns [ErrUnavailable]. A second Stop waits for the first and returns
// nil.
func (s *Service) Stop(ctx context.Context) error {
	s.mu.Lock()
	if s.state == stopping {
		s.mu.Unlock()
		select {
		case <-s.done:
			return nil
		case <-ctx.Done():
			return newError(ErrTimeout, "Stop: %v while another Stop goes on", ctx.Err())
		}
	}
	s.state = stopping
	endpoints := slices.Collect(maps.Values(s.endpoints))
	own := s.own
	s.mu.Unlock()

	defer close(s.done)
	defer s.close()
	s.quit()
	poke(s.news) // STOPPING
	for _, sub := range own {
		_ = sub.Unsubscribe() // fails only on a closed connection
	}
	var draining sync.WaitGroup
	for _, e := range endpoints {
		draining.Go(func() { e.source.drain(ctx) })
	}
	draining.Wait()
	// The answer to a flush comes after all that the server sent before it took the subscriptions away.
	var lost error
	for _, c := range s.conns {
		if err := c.flush(ctx); err != nil {
			lost = err
			for _, e := range endpoints {
				e.source.cut(c)
			}
		}
	}

	finished := closedAfter(func() {
		var all sync.WaitGroup
		for _, e := range endpoints {
			all.Go(func() { e.finish(ctx) })
		}
		all.Wait()
		s.campaigns.Wait() // an exclusive handler must have come to its end before
	})
	var late error
	leaving := ctx
	select {
	case <-finished:
	case <-ctx.Done():
		running := int(s.acting.Load())
		for _, e := range endpoints {
			running += len(e.handling())
		}
		if running > 0 {
			late = newError(ErrTimeout, "Stop: %v with %d handlers running; their ctx has ended", ctx.Err(), running)
		}
		s.draining.Store(true)
		for _, e := range endpoints {
			e.source.interrupt()
		}
		s.cancel()
		select {
		case <-finished:
		case <-time.After(cancelGrace):
			for end := clock() + returnTimeout; s.returning.Load() > 0 && clock() < end; time.Sleep(time.Millisecond) {
			}
		}
		var cancel context.CancelFunc
		leaving, cancel = context.WithTimeout(context.WithoutCancel(ctx), cancelGrace)
		defer cancel()
	}
	s.leave(leaving)
	for _, c := range s.conns {
		if err := c.flush(leaving); err != nil {
			lost = err
		}
	}
	if lost != nil {
		lost = newError(ErrUnavailable, "Stop: no answer from %s: %v; answers may be lost, and the server ends the subscriptions with the connection",
			strings.Join(redacted(s.cfg.urls), ", "), lost)
	}
	return errors.Join(late, lost)
}

// close gives up what is local: it ends every handler's ctx and all calls, and closes the connections. One that is just trying
// to connect closes when nats.go's connect timeout is over; that isn't waited for.
func (s *Service) close() {
	s.cancel()
	var closing sync.WaitGroup
	for _, c := range s.conns {
		c.disconnected()
		closing.Go(c.nc.Close)
	}
	s.quit()
	s.goAway()
	closed := closedAfter(func() {
		closing.Wait()
		s.beating.Wait()
		s.tasks.Wait()
	})
	select {
	case <-closed:
	case <-time.After(cancelGrace):
	}
}

// The pool.

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

func (s *Service) closedError() *Error { return newError(ErrClosed, "service %s was stopped", s.name) }

// disconnectedError is what a call gets when no connection is up.
func (s *Service) disconnectedError() *Error {
	if s.base.Err() != nil {
		return notRun(s.closedError())
	}
	return notRun(newError(ErrUnavailable, "no connection to %s", strings.Join(redacted(s.cfg.urls), ", ")))
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

// Dispatch: from a message to a handler and back.

// A HandlerFunc handles one message: the payload in, the payload of the answer out.
type HandlerFunc func(ctx context.Context, msg *Message) ([]byte, error)

// A Middleware wraps a handler, to check, measure or change what goes in and comes out. It must pass on the ctx that it was
// given, or one derived from it, and not return before next does. An error that it returns without calling next is one of a
// request that did not run.
type Middleware func(next HandlerFunc) HandlerFunc

// The kinds of messages.
const kindRPC, kindEvent, kindCommand, kindCall = "rpc", "event", "command", "call" // the last one only in Stats

// A Message is what a handler is called for, as middleware sees it. Source is the service that sent it by its own account, ""
// if unknown. Header is nil if there is none, and must not be changed.
type Message struct {
	Kind, Subject, Source string // Kind is "rpc", "event" or "command"
	Header                nats.Header
	Data                  []byte
}

// An endpoint is a handler and the workers that run it.
//
// The read loops of all connections put its messages into one channel. A few resident workers take them from there and run
// the handler right away, so that fast handlers pay for no goroutine of their own. More workers, up to the limit, are hired
// where handlers take long: ahead of need if they do so on average, else by watch, which finds workers held up. They leave when
// there is nothing to do. At the limit, watch lets as many messages wait as may run, and refuses the rest.
type endpoint struct {
	svc                 *Service
	source              source
	lease               *candidate // of an exclusive handler, else nil
	sharing             sync.Mutex // one call of share at a time
	kind, name, subject string
	run                 HandlerFunc
	limit, resident     int
	spare               int64 // bytes of the server's max_payload that an answer must leave

	queue    chan *nats.Msg  // from the source
	waiting  chan job        // those that watch lets wait; they come before the queue
	refuse   func(*nats.Msg) // what becomes of the rest; nil if the source brings no more than may run
	stopping chan struct{}   // closed when no more messages will come
	gone     chan struct{}   // closed when all are handled

	idle    atomic.Int32 // workers that wait for a message
	average atomic.Int64 // nanoseconds that the latest messages took, a moving average
	watched atomic.Bool  // watch runs
	meter   *meter

	staff   sync.WaitGroup // workers and watch; none comes when stopping is closed and all have gone
	mu      sync.Mutex     // guards the rest
	workers map[*worker]bool
}

type worker struct {
	msg   atomic.Pointer[nats.Msg] // that it handles, nil while it waits for one
	turns atomic.Uint32            // messages that it has begun
	seen  uint32                   // turns when watch looked last; this and the next are guarded by the endpoint's mu
	kept  uint32                   // turns when longRunning looked last
	long  int                      // how often it saw the same
}

type job struct {
	msg     *nats.Msg
	arrived time.Time // zero: just now
}

const (
	queueSize     = 16384            // bounds what the read loops may put down before somebody looks
	queueAlarm    = queueSize / 8    // a longer queue is too much for the machine, however fast the handler
	slowHandler   = 100_000          // nanoseconds on average that are worth a worker for each message
	watchInterval = time.Millisecond // a worker that handles one message for longer is held up
)

// A source brings messages into an endpoint's queue.
type source interface {
	open(ctx context.Context) error // begins, unless drain was called
	share(on bool) error            // takes part in what the service's instances share, or does no more
	drain(ctx context.Context)      // asks for no more; what is under way still comes, until the connections are flushed
	cut(c *conn)                    // gives up what was to come by a connection that is down
	interrupt()                     // is called before the ctx of what is being handled ends
	settle()                        // is called when nothing more will come; then all is in the queue
	forget(ctx context.Context)     // is called when all is handled
	serve(m *nats.Msg, arrived time.Time)
	pending() int64 // what waits elsewhere to be brought
	done(r *request, data []byte, failure *Error)
}

func (s *Service) handlerConfig(kind string, opts []HandlerOption) (handlerConfig, error) {
	cfg := handlerConfig{
		kind:        kind,
		concurrency: s.cfg.concurrency,
		attempts:    5,
		backoff:     500 * time.Millisecond,
		maxPause:    time.Minute,
		deadline:    5 * time.Minute,
	}
	if kind == kindCommand {
		cfg.attempts = 3
	}
	for _, opt := range opts {
		opt(&cfg)
	}
	return cfg, cfg.err
}

// register adds a handler, wrapped in the service's middleware, and opens it if the service is serving.
func (s *Service) register(e *endpoint, cfg handlerConfig) error {
	e.svc, e.meter = s, newMeter()
	e.limit = cfg.concurrency
	e.resident = min(e.limit, runtime.GOMAXPROCS(0))
	e.workers = map[*worker]bool{}
	e.average.Store(2 * slowHandler) // until it is known better
	e.queue = make(chan *nats.Msg, queueSize)
	e.waiting = make(chan job, e.limit)
	e.stopping, e.gone = make(chan struct{}), make(chan struct{})
	for _, mw := range slices.Backward(s.cfg.middleware) {
		e.run = mw(e.run)
	}

	s.mu.Lock()
	if s.state == stopping {
		defer s.mu.Unlock()
		return s.stateErrorLocked("adding " + e.name)
	}
	key := e.kind + " " + e.name
	if s.endpoints[key] != nil {
		s.mu.Unlock()
		if e.kind == kindEvent {
			return newError(ErrInvalid, "there is a subscription %q already: give a second one to %s another name by Durable", e.name, e.subject)
		}
		return newError(ErrInvalid, "%s has a handler already", e.subject)
	}
	if cfg.exclusive {
		if s.exclusive == nil {
			s.exclusive = s.newCandidate(defaultGroup, s.cfg.failover)
		}
		e.lease = s.exclusive
	}
	s.endpoints[key] = e
	serving := s.state == started
	s.mu.Unlock()

	if !serving {
		return nil
	}
	ctx, cancel := context.WithTimeout(s.base, s.cfg.timeout)
	defer cancel()
	begin := clock()
	err := e.open(ctx)
	if err == nil {
		poke(s.news)
		return errors.Join(s.runForLeader(ctx), s.allowed(ctx, begin))
	}
	s.mu.Lock()
	stopped := s.state == stopping // which sees to it
	delete(s.endpoints, key)
	s.mu.Unlock()
	if !stopped {
		e.source.drain(ctx)
		e.finish(ctx)
	}
	return err
}

func (e *endpoint) open(ctx context.Context) error {
	e.mu.Lock()
	if !isClosed(e.stopping) {
		e.hireLocked(e.resident)
	}
	e.mu.Unlock()
	if err := e.source.open(ctx); err != nil {
		return err
	}
	return e.share()
}

// share has the endpoint take part in what the service's instances share, if the instance is well and, for an exclusive handler, the
// leader. It is called whenever that may have changed.
func (e *endpoint) share() error {
	e.sharing.Lock()
	defer e.sharing.Unlock()
	return e.source.share(!e.svc.unwell.Load() && (e.lease == nil || e.lease.term.Load().holds()))
}

func (s *Service) share() {
	for _, e := range s.handlers() {
		if err := e.share(); err != nil {
			e.svc.log.Error("an endpoint isn't served", "kind", e.kind, "endpoint", e.name, "error", err)
		}
	}
}

// admit gives a request its ctx. It is not ok if the handler is exclusive and this instance doesn't lead, or is about to resign and
// the request is one for it alone.
func (e *endpoint) admit(r *request) (ok bool) {
	r.Context = e.svc.base
	if e.lease == nil {
		return true
	}
	t := e.lease.term.Load()
	if !t.holds() || t.resigned.Err() != nil && r.msg.Subject != e.subject {
		return false
	}
	r.Context, r.term = t, t
	return true
}

// finish waits until all that has arrived is handled.
func (e *endpoint) finish(ctx context.Context) {
	e.source.settle()
	e.mu.Lock()
	close(e.stopping)
	e.mu.Unlock()
	e.staff.Wait()
	close(e.gone)
	e.source.forget(ctx)
}

// hireLocked starts up to n workers within the limit, and returns how many.
func (e *endpoint) hireLocked(n int) int {
	n = min(n, e.limit-len(e.workers))
	for range n {
		w := &worker{}
		e.workers[w] = true
		e.staff.Go(func() { e.work(w) })
	}
	return n
}

func (e *endpoint) work(w *worker) {
	left := false
	defer func() {
		if !left { // the handler has ended its goroutine (runtime.Goexit)
			w.msg.Store(nil)
			e.staff.Go(func() { e.work(w) })
		}
	}()
	for {
		j, ok := e.take()
		if !ok {
			break
		}
		w.turns.Add(1)
		w.msg.Store(j.msg)
		if !e.watched.Load() && e.watched.CompareAndSwap(false, true) {
			e.staff.Go(e.watch)
		}
		average := e.average.Load()
		if e.idle.Load() == 0 && average > slowHandler {
			e.mu.Lock()
			e.hireLocked(1)
			e.mu.Unlock()
		}
		begin := time.Now()
		e.source.serve(j.msg, cmp.Or(j.arrived, begin))
		e.average.Store(average + (int64(time.Since(begin))-average)/8)
		w.msg.Store(nil)
	}
	e.mu.Lock()
	delete(e.workers, w)
	e.mu.Unlock()
	left = true
}

// take waits for the next message; not ok tells the worker to leave.
func (e *endpoint) take() (j job, ok bool) {
	for {
		last := isClosed(e.stopping) // what isn't there now won't come
		select {
		case j := <-e.waiting:
			return j, true
		default:
		}
		select {
		case m := <-e.queue:
			return job{msg: m}, true
		default:
		}
		if idle := e.idle.Add(1); last || int(idle) > e.resident {
			e.idle.Add(-1)
			return job{}, false
		}
		select {
		case m := <-e.queue:
			e.idle.Add(-1)
			return job{msg: m}, true
		case j := <-e.waiting:
			e.idle.Add(-1)
			return j, true
		case <-e.stopping:
			e.idle.Add(-1)
		}
	}
}

// watch runs while no worker is idle. It sees to it that somebody takes the next message though workers are held up, and that no
// more wait than may.
func (e *endpoint) watch() {
	full := false // since no worker was free, until one is idle
	for {
		time.Sleep(watchInterval)
		e.mu.Lock()
		free := len(e.workers)
		for w := range e.workers {
			if turns := w.turns.Load(); turns != w.seen {
				w.seen = turns
			} else if w.msg.Load() != nil {
				free--
			}
		}
		if free < e.resident {
			free += e.hireLocked(e.resident - free + len(e.queue))
		}
		e.mu.Unlock()
		if full = full || free == 0 || len(e.queue) > queueAlarm; full {
			e.shed()
		}
		needless := func() bool {
			return e.idle.Load() > 0 || full && e.refuse == nil || isClosed(e.stopping) && len(e.queue)+len(e.waiting) == 0
		}
		if needless() {
			e.watched.Store(false)
			if needless() || !e.watched.CompareAndSwap(false, true) { // whoever has taken a message in between saw that it ran
				return
			}
		}
	}
}

// shed lets as many messages wait as may run at once, and refuses the rest.
func (e *endpoint) shed() {
	for e.refuse != nil && !isClosed(e.stopping) {
		select {
		case m := <-e.queue:
			select {
			case e.waiting <- job{m, time.Now()}:
			default:
				e.refuse(m)
			}
		default:
			return
		}
	}
}

// handling are the messages that workers handle now.
func (e *endpoint) handling() (msgs []*nats.Msg) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.workers {
		if m := w.msg.Load(); m != nil {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

// longRunning are the messages that workers still handle since the last look, and did not in more than most looks.
func (e *endpoint) longRunning(most int) (msgs []*nats.Msg) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.workers {
		if turns, m := w.turns.Load(), w.msg.Load(); m == nil || turns != w.kept {
			w.kept, w.long = turns, 0
		} else if w.long++; w.long <= most {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

func (e *endpoint) busy() bool {
	return len(e.queue) > 0 || len(e.waiting) > 0 || len(e.handling()) > 0
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// logger is for what concerns one message.
func (e *endpoint) logger(r *request) *slog.Logger {
	return e.svc.log.With("kind", e.kind, "endpoint", e.name, "correlation_id", r.correlationID())
}

// dispatch runs the handler, and hands the payload of its answer, or the error that its caller is to see, to the source's done:
// whatever the handler does, even if it panics or ends its goroutine.
func (e *endpoint) dispatch(r *request) {
	if r.lost() { // since it was admitted
		failure := e.lease.notActive()
		e.meter.ended(r.msg.Source, failure)
		r.fenced = true
		r.end()
		e.source.done(r, nil, failure)
		return
	}
	begin := e.meter.begin()
	var data []byte
	failure := errGoexit
	defer func() {
		if p := recover(); p != nil {
			failure = newError(ErrInternal, "panic in %s: %v", e.name, p)
			e.logger(r).Error("handler panicked", "error", p, "stack", string(debug.Stack()))
		}
		if failure == errGoexit {
			failure = newError(ErrInternal, "panic in %s: the handler called runtime.Goexit", e.name)
		}
		if failure == nil && r.run != nil {
			failure = r.run.whyLost()
		}
		if r.ran && r.lost() {
			r.fenced = true
			f := newError(ErrFenced, "%s lost the leadership, of term %d, while %s ran: its effect may or may not stand", e.svc.id, r.term.number, e.name)
			f.Cause = failure
			failure = f
		}
		if failure != nil {
			f := *failure
			f.Source, f.NotRun = e.svc.name, !r.ran
			failure = &f
		}
		r.end()
		e.meter.handled(r.msg.Source, begin, failure)
		e.source.done(r, data, failure)
	}()
	data, err := e.run(r, &r.msg)
	failure = asError(err)
	if limit := e.svc.conns[0].limit.Load() - e.spare; failure == nil && int64(len(data)) > limit {
		r.hopeless = true
		failure = newError(ErrInternal, "the answer of %s has %d bytes, more than the %d that the server's max_payload leaves: split it, or raise that limit", e.name, len(data), limit)
	}
}

// lost tells that the handler is exclusive, and its term over.
func (r *request) lost() bool { return r.term != nil && !r.term.holds() }

var errGoexit = &Error{} // stands until the handler returns

// The context of a message.

// A request is the ctx of a handler. What costs a timer or a lock is made when it is first asked for.
type request struct {
	context.Context // the service's own
	svc             *Service
	msg             Message
	in              *nats.Msg
	reply           string
	from            address
	id              string // if the reply subject tells none
	deadline        time.Time
	packer          *packer   // holds the answer
	codec           Codec     // of the payload, once it was decoded
	hopeless        bool      // another attempt would not help
	ran             bool      // the handler was called
	delivery        *delivery // nil for a request
	run             *run      // of a command
	term            *term     // that an exclusive handler was called in
	fenced          bool      // the term was over when it returned

	mu     sync.Mutex // guards timed and cancel
	timed  context.Context
	cancel context.CancelFunc
}

type requestKey struct{}

func (r *request) Value(key any) any {
	if key == (requestKey{}) {
		return r
	}
	r.mu.Lock()
	timed := r.timed
	r.mu.Unlock()
	if timed == nil {
		return r.Context.Value(key)
	}
	return timed.Value(key)
}

func (r *request) Deadline() (time.Time, bool) { return r.deadline, true }
func (r *request) Done() <-chan struct{}       { return r.live().Done() }
func (r *request) Err() error                  { return r.live().Err() }

// live is a ctx that ends with the deadline, with the handler, when the caller cancels, or when Stop's time is up.
func (r *request) live() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timed == nil {
		r.timed, r.cancel = context.WithDeadline(r.Context, r.deadline)
		if r.reply != "" {
			r.svc.cancels.add(r.reply, r.cancel)
		}
	}
	return r.timed
}

var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// abort ends the ctx before that.
func (r *request) abort() {
	r.live()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cancel != nil {
		r.cancel()
	}
}

// end ends the ctx, since its handler has returned.
func (r *request) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.timed == nil {
		r.timed = ended
		return
	}
	r.svc.cancels.remove(r.reply)
	r.cancel()
}

func requestOf(ctx context.Context) *request {
	r, _ := ctx.Value(requestKey{}).(*request)
	return r
}

// CorrelationID names the request that ctx belongs to, the same in each service that it passes through, for logs. In a
// handler there always is one; elsewhere it is what [WithHeader] set as Aegis-Correlation-Id, else "". An error of a call made
// without one tells the call's own in Details["correlation_id"].
func CorrelationID(ctx context.Context) string {
	if id := sent(ctx).Get(headerCorrelation); id != "" {
		return id
	}
	if r := requestOf(ctx); r != nil {
		return r.correlationID()
	}
	return ""
}

func (r *request) correlationID() string {
	if id := r.msg.Header.Get(headerCorrelation); id != "" {
		return id
	}
	if r.from.call != "" {
		return r.from.correlationID()
	}
	return r.id + r.reply
}

// Headers are those of the message that ctx's handler was called for, nil if there are none. They must not be changed.
func Headers(ctx context.Context) nats.Header {
	if r := requestOf(ctx); r != nil {
		return r.msg.Header
	}
	return nil
}

type sentKey struct{}

// WithHeader adds a header to all that is sent with the returned ctx; a later one of the same key replaces it. Of the headers
// that a handler received only the trace context (traceparent, tracestate) and the correlation id travel on by themselves. A
// key that is no HTTP token makes the call fail with [ErrInvalid].
func WithHeader(ctx context.Context, key, value string) context.Context {
	return context.WithValue(ctx, sentKey{}, withHeader(sent(ctx), key, value))
}

// withHeader is h, which is left as it is, with one header set.
func withHeader(h nats.Header, key, value string) nats.Header {
	out := make(nats.Header, len(h)+1)
	maps.Copy(out, h)
	out[key] = []string{value}
	return out
}

func sent(ctx context.Context) nats.Header {
	h, _ := ctx.Value(sentKey{}).(nats.Header)
	return h
}

// headersFor are the headers to send with ctx: those of WithHeader, and what travels on from the message being handled. The
// correlation id that can travel in the reply subject comes apart.
func headersFor(ctx context.Context) (h nats.Header, correlation string) {
	h = sent(ctx)
	r := requestOf(ctx)
	if r == nil {
		return h, ""
	}
	inherit := func(key, value string) {
		if value != "" && h[key] == nil {
			h = withHeader(h, key, value)
		}
	}
	if correlation = r.correlationID(); h[headerCorrelation] != nil || !isToken(correlation, 64) {
		inherit(headerCorrelation, correlation)
		correlation = ""
	}
	inherit(headerTraceParent, r.msg.Header.Get(headerTraceParent))
	inherit(headerTraceState, r.msg.Header.Get(headerTraceState))
	return h, correlation
}

// backoff is a random pause between 0 and first·2ⁿ⁻¹, at most the longest.
func backoff(n int, first, longest time.Duration) time.Duration {
	d := longest
	if n = max(n, 1); n < 64 && first <= longest>>(n-1) {
		d = first << (n - 1)
	}
	return mrand.N(d + 1)
}

// closedAfter is closed when fn has returned.
func closedAfter(fn func()) <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		fn()
	}()
	return c
}

// withDeadline is ctx, which ends after d if it has no deadline of its own.
func withDeadline(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, d)
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

// subscribeOwn listens for what isn't meant for a handler; each message reaches the instance once, on any connection.
func (s *Service) subscribeOwn() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for subject, fn := range map[string]nats.MsgHandler{
		cancelSubject(s.name):           s.cancels.receive,
		"$SRV.*":                        s.answerSurvey,
		"$SRV.*." + s.name:              s.answerSurvey,
		"$SRV.*." + s.name + "." + s.id: s.answerSurvey,
	} {
		for _, c := range s.conns {
			sub, err := c.nc.QueueSubscribe(subject, s.name+"."+s.id, fn)
			if err != nil {
				return newError(ErrUnavailable, "subscribing to %s: %v", subject, err)
			}
			if subject != cancelSubject(s.name) { // which handlers need until the end
				s.own = append(s.own, sub)
			}
		}
	}
	return nil
}
