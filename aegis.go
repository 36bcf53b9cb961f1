// Package aegis is a service kit on NATS: typed RPC over a pool of connections, with deadlines, typed errors and retries;
// durable events on JetStream, with dead letters; tracked commands, with one outcome each; leader election and discovery;
// metrics.
//
// # Usage
//
// [New] makes a [Service], which can make calls at once. After [Service.Start] (or [Service.Run]) it also serves the handlers
// that were given to [Handle], [Subscribe] and [HandleCommand]:
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
// A call runs at most once. A request that may have run is never sent again by itself: [Retry] and [Sticky] resend a request
// only after an [Error] with NotRun, which says that the request certainly did not reach a handler. [Idempotent] lifts that
// restriction. Every request that arrives is answered, with an error if need be, unless its caller has stopped waiting.
//
// An event is handled at least once by each service that subscribes to it. [Publish] returns when the server has stored the
// event. The event is acknowledged when its handler has returned nil, or when the event is stored as a dead letter.
//
// A command has one outcome, which is stored. After that its handler is not called again. Before that the handler may be called
// more than once, because of an error or a crash; see [HandleCommand].
//
// An [Exclusive] handler runs in one instance only, the leader. There is never more than one leader. [Term] returns its fencing
// token.
//
// # Concurrency
//
// All functions and methods may be called from several goroutines at once. Handlers run concurrently, up to a limit for each
// method ([WithConcurrency], [Concurrency]). At the limit, as many requests again may wait for their turn, and the rest are
// rejected with [ErrOverloaded]. Events and commands are not rejected: they wait in the server. The ctx of a handler ends with
// the deadline of its caller (for an event or a command: [Deadline]), when its caller cancels, and when Stop runs out of time.
//
// # Shutdown
//
// [Service.Stop] takes no more work, lets running handlers finish, gives back to the server the events and commands that there
// is no time for, hands over the leadership, leaves the registry, and closes the connections. The only goroutines that it may
// leave behind are those of handlers that ignore their ctx.
//
// # Observation
//
// [Service.Stats] counts the results of every request, event, command and call. [Service.Handler] serves these figures to
// Prometheus, beside health probes. Started services answer the nats tool (nats micro ls, info, stats, ping). Each log line
// about a message has its correlation id, which [CorrelationID] returns for the handler's own logs. The W3C trace context of a
// message is passed on to everything that its handler sends.
package aegis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has the Service, and its life: New, Start, Stop.
//
// A value travels one way, and its answer comes back the same way:
//
//	value → codec → request → connection → server → source → queue → worker → dispatch → handler → answer
//
// The files form three layers, and each layer is built on the ones after it:
//
//   - The patterns: rpc.go, events.go, schedules.go (events for later), deadletters.go, jobs.go, commands.go, timetable.go (commands
//     for later), election.go, registry.go, health.go, and metrics.go, which counts what they do.
//   - The primitives that carry them: dispatch.go (from a message to its handler and back), context.go (what the handler knows
//     about it), feed.go (from a consumer to the queue), jetstream.go (streams, keys and watches), exchange.go (request: a
//     message out, its answer back), carrier.go (the connection of the feeds), conn.go (the connections).
//   - The ground: options.go, codec.go, errors.go.

// A Service is one instance of a named service: a pool of connections to NATS, the handlers, and the calls that it makes.
type Service struct {
	name, id       string
	cfg            *config
	log            *slog.Logger
	conns          []*conn
	carrier        carrier
	next           atomic.Uint32    // counts the calls of pick, so that the connections take turns
	breakers       lookup[*breaker] // by the service that is called
	calls          lookup[*meter]   // by <service>.<method>
	inFlight       tally            // calls to certain instances
	cancels        cancels
	denials        denials
	callMiddleware HandlerFunc // the middleware of WithCallMiddleware around transmit; nil if there is none

	elections   watching[*leaderWatch] // by <service>.<group>
	directories watching[*directory]   // by service
	leaseLog    leaseLog
	leading     atomic.Int32   // how many functions of Lead are running
	campaigns   sync.WaitGroup // counts the candidates that campaign

	since        time.Time     // when the service was made
	unhealthy    atomic.Bool   // whether a health check fails
	healthMu     sync.Mutex    // held by noteHealth
	healthOnce   sync.Once     // starts the health checks
	healthKnown  chan struct{} // closed when all checks have had a result
	metadata     atomic.Pointer[map[string]string]
	entryChanged chan struct{}   // tells heartbeats to write the registry entry now
	heartbeatCtx context.Context // ends when heartbeats has to return
	heartbeating sync.WaitGroup  // counts the goroutine of heartbeats

	broken   context.Context // ends when a connection is closed for good, with an *Error as its cause
	quitting context.Context // ends when Stop begins
	hurried  context.Context // ends when the ctx of a second Stop has ended before the first Stop is finished
	base     context.Context // the parent of every handler's ctx; ends when Stop's time is up

	breakDown                          context.CancelCauseFunc // ends broken
	endHeartbeats, quit, hurry, cancel context.CancelFunc      // end heartbeatCtx, quitting, hurried and base

	inHandler sync.Map // has the numbers of the goroutines that call handlers or a function of Lead as its keys

	tasks      sync.WaitGroup // counts the goroutines that end when base does
	ready      atomic.Bool    // whether Start has succeeded
	timeUp     atomic.Bool    // set when Stop's time is up: messages that no handler has begun are refused or given back
	requeueing atomic.Int32   // commands that are being queued again
	closed     atomic.Bool    // the connections are being closed, or were
	done       chan struct{}  // closed at the end of Stop

	exclusive       atomic.Pointer[candidate] // campaigns for the exclusive handlers; nil if there are none
	mayBeRegistered atomic.Bool               // whether the registry may have an entry of this instance; set only before Stop begins

	mu                 sync.Mutex // guards the rest
	state              state
	endpoints          map[string]*endpoint // by kind and name
	candidates         map[*candidate]bool
	internalSubs       []*nats.Subscription // subscriptions that belong to no endpoint; Stop ends them when it begins
	registrationErrors []error              // the failures of Handle, Subscribe and HandleCommand before Start
}

type state int

const serviceCreated, serviceStarted, serviceStopping state = 0, 1, 2

// New makes an instance of the service called name (a letter, then letters, digits, - and _, at most 64) and connects it. It
// blocks until every connection of the pool is made, each for at most nats.go's connect timeout (2 s for each server). Use
// [Service.Stop] to close the instance.
//
// Errors:
//   - [ErrInvalid] for a name or an option that is out of range, or for metadata that is too large
//   - [ErrUnavailable] if the servers can't be reached or refuse the connection
func New(name string, opts ...Option) (*Service, error) {
	if !isName(name, maxService) {
		return nil, newError(ErrInvalid, "service name %q: want a letter, then letters, digits, - and _, at most %d", name, maxService)
	}
	cfg, failure := newConfig(opts)
	if failure != nil {
		return nil, failure
	}
	id := cmp.Or(deref(cfg.id), fmt.Sprintf("%s-%08x", name, rand.Uint32()))
	s := &Service{
		name: name, id: id, cfg: cfg, log: cfg.logger.With("service", name, "instance", id), since: time.Now(),
		calls: lookup[*meter]{most: 1024}, cancels: cancels{funcs: map[string]context.CancelFunc{}},
		endpoints: map[string]*endpoint{}, candidates: map[*candidate]bool{},
		entryChanged: make(chan struct{}, 1), healthKnown: make(chan struct{}), done: make(chan struct{}),
	}
	s.elections.svc, s.elections.make = s, s.newLeaderWatch
	s.directories.svc, s.directories.make = s, s.newDirectory
	s.metadata.Store(&cfg.metadata)
	if len(cfg.callMiddleware) > 0 {
		s.callMiddleware = transmit
		for _, mw := range slices.Backward(cfg.callMiddleware) {
			s.callMiddleware = mw(s.callMiddleware)
		}
	}
	s.broken, s.breakDown = context.WithCancelCause(context.Background())
	s.quitting, s.quit = context.WithCancel(context.Background())
	s.hurried, s.hurry = context.WithCancel(context.Background())
	s.base, s.cancel = context.WithCancel(context.Background())
	s.heartbeatCtx, s.endHeartbeats = context.WithCancel(context.Background())
	for range cfg.pool {
		c, err := s.connect(false)
		if err != nil {
			s.close()
			return nil, err
		}
		s.conns = append(s.conns, c)
	}
	if err := s.setMetadata("WithMetadata", cfg.metadata); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// Name returns the service's name.
func (s *Service) Name() string { return s.name }

// ID returns the instance's id.
func (s *Service) ID() string { return s.id }

// Conn returns a connection of the pool, for what aegis does not do. The service goes on using it: don't close or drain it.
func (s *Service) Conn() *nats.Conn { return cmp.Or(s.pick(), s.conns[0]).nc }

// Start begins to serve. It runs the health checks once, makes the streams, buckets and consumers that the handlers need and
// that do not exist, subscribes, and enters the instance into the registry. When it returns, the servers of all connections
// know the handlers; more handlers may be added later. An instance with [Exclusive] handlers then campaigns for the leadership.
// If nobody has led the service before, the first leader is elected after the Lease of its policy ([WithFailover]). While a
// connection is down, Start waits for it until ctx ends. A service whose Start failed can only be stopped.
//
// If an earlier Handle, Subscribe or HandleCommand has failed, Start serves nothing and returns their errors, joined (see
// [errors.Join]). The other errors are:
//   - [ErrClosed] after Stop
//   - [ErrInvalid] if the service was started already, or a stream, bucket or consumer that exists can't be used
//   - [ErrUnavailable] if the server can't be reached before ctx ends, or has no JetStream and a handler needs it
//   - [ErrDenied] if the server's permissions do not allow what the service does
//   - [ErrOverloaded] if the server refuses a subscription because of its max_subscriptions
//   - [ErrTimeout] or [ErrCanceled] if ctx ends before
//
// Without JetStream an instance serves plain RPC, but is not in the registry.
func (s *Service) Start(ctx context.Context) error {
	begin := clock()
	s.mu.Lock()
	if s.state != serviceCreated {
		defer s.mu.Unlock()
		if s.state == serviceStopping {
			return newError(ErrClosed, "Start: service %s was stopped", s.name)
		}
		return newError(ErrInvalid, "Start: service %s was started already", s.name)
	}
	s.state = serviceStarted
	unregistered := errors.Join(s.registrationErrors...)
	s.mu.Unlock()
	if unregistered != nil {
		return unregistered
	}
	if err := s.awaitConnections(ctx, s.conns...); err != nil {
		return err
	}

	select {
	case <-s.startHealth():
	case <-ctx.Done():
	}
	check := func(ctx context.Context) error { return s.checkDenials(ctx, begin) }
	for _, step := range []func(context.Context) error{s.openAll, s.subscribeOwn, check, s.register, s.campaignForExclusive, check} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	s.ready.Store(true)
	s.log.Info("the service has started", "version", s.cfg.version, "handlers", len(s.allEndpoints()), "took", clock()-begin)
	return nil
}

// openAll opens all endpoints, several at a time, and returns the error of the first that failed.
func (s *Service) openAll(ctx context.Context) error {
	endpoints := s.allEndpoints()
	failures := make([]error, len(endpoints))
	var next atomic.Int64
	var openers sync.WaitGroup
	for range min(len(endpoints), 16) {
		openers.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(endpoints); i = int(next.Add(1)) - 1 {
				failures[i] = endpoints[i].open(ctx)
			}
		})
	}
	openers.Wait()
	return cmp.Or(failures...)
}

// noteRegistration notes the failure of Handle, Subscribe or HandleCommand for Start, which returns it in case nobody has checked it.
// It returns err.
func (s *Service) noteRegistration(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.state == serviceCreated && len(s.registrationErrors) < 100 {
		s.registrationErrors = append(s.registrationErrors, err)
	}
	return err
}

// subscribeOwn subscribes to the messages that are not meant for a handler: cancellations, and the surveys of the nats tool.
// All connections of the instance form one queue group, so that each message reaches the instance once.
func (s *Service) subscribeOwn(context.Context) error {
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
			if subject != cancelSubject(s.name) { // that one stays, because Stop waits for handlers, which may be cancelled
				s.internalSubs = append(s.internalSubs, sub)
			}
		}
	}
	return nil
}

// Run serves until ctx ends: it calls Start, waits, and calls Stop, which gets the time of [WithStopTimeout] to finish what runs.
// It calls Stop too if Start fails, and if a connection is closed for good, because of [nats.MaxReconnects] for example. Then it
// returns an error.
func (s *Service) Run(ctx context.Context) error {
	err := s.Start(ctx)
	if err == nil {
		select {
		case <-ctx.Done():
		case <-s.done: // somebody else has called Stop
		case <-s.broken.Done():
			err = context.Cause(s.broken)
		}
	} else if ctx.Err() != nil {
		err = nil // ctx ended before the service had begun
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.stopTimeout)
	defer cancel()
	return errors.Join(err, s.Stop(ctx))
}

const cancelGrace = 200 * time.Millisecond // for the next handler to return after Stop has cancelled all; for Stop's last steps
const returnTimeout = 5 * time.Second      // for all of them to return, and for their commands to be queued again

// Stop stops serving. It takes no more requests, waits until those that have arrived are answered, releases the leadership,
// leaves the registry, and closes the connections. Calls of this service that still wait for an answer then fail with
// [ErrClosed]. The functions of [Service.Lead] have their ctx cancelled when Stop begins.
//
// When ctx ends before that, requests that have not begun are refused, and the ctx of the handlers that run is cancelled. Stop
// goes on as long as handlers return, for 5 s at most, and gives their events and commands back to the server. When no handler
// has returned for 0.2 s, Stop leaves the rest behind. It returns [ErrTimeout] if handlers were running when ctx ended. If the
// server can't be reached, Stop closes what is local and returns [ErrUnavailable].
//
// A second Stop waits for the first one and returns nil. If its ctx ends first, the time of the first one is up, too. Stop can't
// be called by a handler or a function of Lead on its own goroutine, because it would wait for itself: it returns [ErrInvalid].
// Such a function can call it on another goroutine, and return.
func (s *Service) Stop(ctx context.Context) error {
	_, inHandler := s.inHandler.Load(goroutine())
	if r := requestOf(ctx); inHandler || r.svc == s && r.Err() == nil {
		return newError(ErrInvalid, "Stop: called by a handler, for which it would wait: call it by go, with another ctx, and return")
	}
	s.mu.Lock()
	if s.state == serviceStopping {
		s.mu.Unlock()
		select {
		case <-s.done:
			return nil
		case <-ctx.Done():
			if isClosed(s.done) {
				return nil
			}
			s.hurry()
			<-s.done
			return newError(ErrTimeout, "Stop: %v while another Stop was running", ctx.Err())
		}
	}
	s.state = serviceStopping
	endpoints := slices.Collect(maps.Values(s.endpoints))
	own := s.internalSubs
	s.mu.Unlock()

	begin := clock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.hurried, cancel)()
	defer func() {
		s.close()
		if s.ready.Load() {
			s.log.Info("the service has stopped", "took", clock()-begin)
		}
		close(s.done)
	}()
	s.quit()
	signal(s.entryChanged) // the status in the registry entry is STOPPING now
	for _, sub := range own {
		_ = sub.Unsubscribe() // fails only on a closed connection
	}
	finished := closedAfter(func() {
		var all sync.WaitGroup
		for _, e := range endpoints {
			all.Go(func() { e.finish(ctx) })
		}
		all.Wait()
		s.campaigns.Wait() // a candidate that leads releases its term when the exclusive handlers are finished
	})
	var late, lost error
	leaving := ctx // a variable of its own, because finish may still use ctx
	select {
	case <-finished:
	case <-ctx.Done():
		running := s.runningHandlers(endpoints)
		if running > 0 {
			late = newError(ErrTimeout, "Stop: %v with %d handlers running; their ctx has ended", ctx.Err(), running)
		}
		s.timeUp.Store(true)
		s.cancel()
		// Handlers that heed their ctx have time as long as others of them return.
		for end, before := clock()+returnTimeout, -1; clock() < end && (running != before || s.requeueing.Load() > 0); {
			before = running
			select {
			case <-finished:
				end = 0
			case <-time.After(cancelGrace):
				running = s.runningHandlers(endpoints)
			}
		}
		var cancel context.CancelFunc
		leaving, cancel = context.WithTimeout(context.WithoutCancel(ctx), cancelGrace)
		defer cancel()
	}
	s.deregister(leaving)
	if failure := s.flush(leaving); failure != nil {
		lost = newError(failure, "Stop: %s; answers may be lost, and the server ends the subscriptions with the connection", failure.Message)
	}
	return errors.Join(late, lost)
}

// close ends every handler's ctx and all calls, and closes the connections. It waits for that no longer than cancelGrace,
// because nats.go closes a connection that is just trying to reconnect only when its connect timeout is over.
func (s *Service) close() {
	s.closed.Store(true)
	s.cancel()
	var closing sync.WaitGroup
	closing.Go(s.closeCarrier)
	for _, c := range s.conns {
		c.disconnected() // so that the calls that wait on c fail, and no other begins
		closing.Go(c.nc.Close)
	}
	select {
	case <-closedAfter(func() {
		closing.Wait()
		s.heartbeating.Wait()
		s.tasks.Wait()
	}):
	case <-time.After(cancelGrace):
	}
}

// runningHandlers returns how many handlers run, and functions of Lead.
func (s *Service) runningHandlers(endpoints []*endpoint) int {
	running := int(s.leading.Load())
	for _, e := range endpoints {
		running += e.running()
	}
	return running
}

// startTask runs fn, which has to end when base does, on a goroutine that Stop waits for. It reports false if Stop has begun.
func (s *Service) startTask(fn func()) bool { return s.unlessStopping(func() { s.tasks.Go(fn) }) }

// unlessStopping calls fn unless Stop has begun, and reports whether it did. It holds s.mu meanwhile, so that Stop waits for
// everything that fn has added to a WaitGroup.
func (s *Service) unlessStopping(fn func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == serviceStopping {
		return false
	}
	fn()
	return true
}

// allEndpoints returns the endpoints of all handlers.
func (s *Service) allEndpoints() []*endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.endpoints))
}

func (s *Service) closedError() *Error { return newError(ErrClosed, "service %s was stopped", s.name) }

// asHandler calls fn, which calls handlers or a function of Lead on this goroutine, for which Stop waits.
func (s *Service) asHandler(fn func()) {
	id := goroutine()
	s.inHandler.Store(id, true)
	defer s.inHandler.Delete(id)
	fn()
}

// goroutine returns the number of the goroutine that calls it, as stack traces show it. It only serves to recognize a Stop that
// would wait for itself.
func goroutine() string {
	stack := make([]byte, 64)
	stack = stack[:runtime.Stack(stack, false)]
	number, _, _ := strings.Cut(strings.TrimPrefix(string(stack), "goroutine "), " ")
	return number
}

// isClosed reports whether c is closed. Nothing is ever sent on c.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// closedAfter returns a channel that is closed when fn has returned.
func closedAfter(fn func()) <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		fn()
	}()
	return c
}

// signal wakes whoever receives from c, which has room for one signal.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // a signal is waiting already
	}
}
