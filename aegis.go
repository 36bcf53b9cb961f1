// Package aegis is a kit for services that communicate over NATS. It has typed RPC, with deadlines, typed errors and retries;
// durable events, with dead letters; commands, which are queued and have one stored outcome each; leader election; discovery; and
// metrics. RPC needs only a NATS server. The other parts, except metrics, also need JetStream.
//
// # Usage
//
// [New] makes a [Service] and connects it. The Service can make calls, publish events and send commands at once. After
// [Service.Start] or [Service.Run], it also serves the handlers that were added by [Handle], [Subscribe] and [HandleCommand]. In
// this example, client is another Service:
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
// The payload of a message is the encoded value and nothing else, so that any NATS client can call a method:
//
//	nats req rpc.order-service.create_order '{"sku":"x"}'
//
// # Delivery
//
// A call runs its handler at most once, unless it is [Idempotent]. [Retry] and [Sticky] send a request again only after an
// [Error] whose NotRun is set, which says that the request certainly did not reach a handler. [Idempotent] also allows that for
// a request that may have reached one. Every request that reaches an instance is answered, if necessary with an error, unless
// its caller no longer waits.
//
// An event is handled at least once by each service that subscribes to it. [Publish] returns when the server has stored the
// event. The event is acknowledged when its handler has returned nil, or when the event has been stored as a dead letter.
//
// A command has one outcome, which is stored. Until then, its handler may be called more than once, because of an error or a
// crash. Once the outcome is stored, the handler is not called again; see [HandleCommand].
//
// An [Exclusive] handler runs only in the instance that leads the service. A service never has more than one leader. [Term]
// returns the fencing token of the leader, which protects a store against a process that was paused and notices late that it no
// longer leads.
//
// # Concurrency
//
// All functions and methods may be called from several goroutines at once. Each handler runs concurrently, up to a limit in each
// instance ([WithConcurrency], [Concurrency]). At the limit, the same number of requests may wait, and further requests are
// rejected with [ErrOverloaded]. Events and commands are not rejected: they wait in the server. The ctx of a handler ends at the
// deadline of its caller (for an event or a command, after [Deadline]), when its caller cancels, and when Stop runs out of time.
//
// # Shutdown
//
// [Service.Stop] accepts no more work, lets running handlers finish, returns to the server the events and commands that it has no
// time for, gives up the leadership, removes the instance from the registry, and closes the connections. The only goroutines that
// Stop may leave behind are those of handlers that ignore their ctx.
//
// # Errors
//
// Most functions that fail return an [*Error]. Use [errors.Is] to compare it with a sentinel, such as [ErrTimeout].
//
// # Observation
//
// [Service.Stats] counts the results of every request, event, command and call. [Service.Handler] serves these counts to
// Prometheus, and health probes. A started service answers the nats tool (nats micro ls, info, stats, ping). Each log line
// about a message has the correlation id of the message, which [CorrelationID] returns for the handler's own log lines. The W3C
// trace context of a message is passed on to everything that its handler sends with its ctx.
package aegis

import (
	"cmp"
	"context"
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

// This file has the Service, and its life: New, Start, Run, Stop.
//
// A value travels one way, and its answer comes back the same way:
//
//	value → codec → request → connection → server → source → queue → worker → dispatch → handler → answer
//
// The files form three layers, and each layer is built on the ones after it:
//
//   - The patterns: rpc.go, events.go, schedules.go (delayed events), deadletters.go, jobs.go (sending commands), commands.go
//     (handling them), records.go (their records), timetable.go (delayed and recurring commands), election.go, registry.go,
//     health.go, and metrics.go, which counts what they do.
//   - The primitives that carry them: dispatch.go (from a message to its handler and back), context.go (what the handler knows
//     about it), feed.go (from a consumer to the queue), jetstream.go (streams and keys), watch.go (local copies of keys),
//     request.go (a message out, its answer back), carrier.go (the connection of the feeds), conn.go (the connections).
//   - The ground: options.go, codec.go, msgpack.go, errors.go, names.go, time.go.

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
	healthMu     sync.Mutex    // guards healthCheck.contrary; held while endpoints and entry follow a change
	healthOnce   sync.Once     // starts the health checks
	healthKnown  chan struct{} // closed when all checks have had a result
	metadata     atomic.Pointer[map[string]string]
	entryChanged chan struct{}   // receives a signal when sendHeartbeats is to write the registry entry now
	heartbeatCtx context.Context // ends when sendHeartbeats has to return
	heartbeating sync.WaitGroup  // counts the goroutine of sendHeartbeats

	broken   context.Context // ends when a connection is closed for good, with an *Error as its cause
	quitting context.Context // ends when Stop begins
	hurried  context.Context // ends when the ctx of a second Stop has ended before the first Stop is finished
	base     context.Context // the parent of every handler's ctx; ends when Stop's time is up

	breakDown                          context.CancelCauseFunc // ends broken
	endHeartbeats, quit, hurry, cancel context.CancelFunc      // end heartbeatCtx, quitting, hurried and base

	inHandler sync.Map // the numbers of the goroutines that run handlers or a function of Lead, as keys; see goroutine

	tasks      sync.WaitGroup // counts the goroutines that end when base does
	ready      atomic.Bool    // whether Start has succeeded
	timeUp     atomic.Bool    // set when Stop's time is up; then messages that no handler has begun are refused
	requeueing atomic.Int32   // commands that are being queued again
	closed     atomic.Bool    // set when the connections are about to be closed
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

// New makes an instance of the service called name and connects it. name is a letter, then letters, digits, - and _, at most 64
// characters. New blocks until every connection of the pool is made, and for each of them at most for nats.go's connect timeout
// (2 s for each server by default). Use [Service.Stop] to close the instance.
//
// Errors:
//   - [ErrInvalid] if name or an option is invalid, or if the metadata is too large
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

// Name returns the name of the service.
func (s *Service) Name() string { return s.name }

// ID returns the id of the instance.
func (s *Service) ID() string { return s.id }

// Conn returns a connection of the pool, for operations that aegis does not offer. The service also uses the connection, so do
// not close or drain it.
func (s *Service) Conn() *nats.Conn { return cmp.Or(s.pick(), s.conns[0]).nc }

// Start makes the service serve its handlers. It runs the health checks once, makes those streams, buckets and consumers that the
// handlers need and that do not exist, subscribes, and adds the instance to the registry. When Start returns, the servers of all
// connections know the handlers. More handlers may be added later. An instance with [Exclusive] handlers then campaigns for the
// leadership. If nobody has led the service before, the first leader is elected after the Lease of its policy ([WithFailover]).
// While a connection is down, Start waits for it until ctx ends. A service whose Start has failed can only be stopped.
//
// Without JetStream an instance serves calls, but is not in the registry. Exclusive handlers, events and commands need JetStream.
//
// Errors:
//   - those of earlier calls of Handle, Subscribe and HandleCommand that have failed, joined as by [errors.Join]; then Start
//     serves nothing
//   - [ErrClosed] after Stop
//   - [ErrInvalid] if the service was started already, or if a stream, bucket or consumer exists but can't be used
//   - [ErrUnavailable] if the server can't be reached before ctx ends, or if a handler needs JetStream and the server has none
//   - [ErrDenied] if the server's permissions do not allow what the service does
//   - [ErrOverloaded] if the server refuses a subscription because of its max_subscriptions
//   - [ErrTimeout] or [ErrCanceled] if ctx ends before Start has finished, or [ErrTimeout] if JetStream does not answer
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
	err := joinErrors(s.registrationErrors...)
	s.mu.Unlock()
	if err != nil {
		return err
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

// noteRegistration returns err, the result of Handle, Subscribe or HandleCommand. Before Start it also keeps an error, so that
// Start returns it even if the caller has not checked it. It keeps at most 100.
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
			if subject != cancelSubject(s.name) { // that one stays: Stop waits for handlers, and their callers may still cancel
				s.internalSubs = append(s.internalSubs, sub)
			}
		}
	}
	return nil
}

// Run serves until ctx ends: it calls Start, waits, and calls Stop, which has the time of [WithStopTimeout] to let running
// handlers finish. Run also calls Stop and returns if Start fails, if another goroutine calls Stop, and if a connection is closed
// for good. Run returns nil if ctx has ended and Stop has succeeded.
//
// Errors, which are joined if there are several:
//   - those of [Service.Start], unless ctx had ended when Start failed
//   - [ErrUnavailable] if a connection was closed for good, for example because of [nats.MaxReconnects]
//   - those of [Service.Stop]
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
	return joinErrors(err, s.Stop(ctx))
}

// cancelGrace is how long Stop waits for another handler to return after it has cancelled them. Its last steps have as long.
const cancelGrace = 200 * time.Millisecond

// returnTimeout bounds the time in which cancelled handlers return and their commands are queued again.
const returnTimeout = 5 * time.Second

// Stop ends the service. It accepts no more work, waits until the requests, events and commands that have arrived are handled,
// gives up the leadership, removes the instance from the registry, and closes the connections. Calls of this service that still
// wait for an answer then fail with [ErrClosed]. The ctx of each function of [Service.Lead] ends when Stop begins.
//
// If ctx ends while handlers run, their ctx is cancelled, and requests that no handler has begun are refused. Stop then waits as
// long as handlers return, for 5 s at most, and returns their events and commands to the server. When no handler has returned for
// 0.2 s, Stop no longer waits for those that still run.
//
// A second Stop waits for the first one and returns nil. If the ctx of the second Stop ends first, the time of the first Stop is
// up too. A handler or a function of Lead can't call Stop on its own goroutine, or with its own ctx, because Stop would wait for
// it. It can call Stop on another goroutine with another ctx, and return.
//
// Errors, which are joined if there are several:
//   - [ErrTimeout] if handlers were running when ctx ended, or if this is a second Stop and its ctx ended before the first Stop
//     returned
//   - [ErrUnavailable] if the server can't be reached; the connections are closed all the same
//   - [ErrInvalid] if a handler or a function of Lead calls Stop on its own goroutine or with its own ctx
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
	internal := s.internalSubs
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
	for _, sub := range internal {
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
	leaving := ctx // for the last steps
	select {
	case <-finished:
	case <-ctx.Done():
		running := s.runningHandlers(endpoints)
		if running > 0 {
			late = newError(ErrTimeout, "Stop: %v with %d handlers running; their ctx has ended", ctx.Err(), running)
		}
		s.timeUp.Store(true)
		s.cancel()
		s.awaitCancelled(endpoints, finished, running)
		var cancel context.CancelFunc
		leaving, cancel = context.WithTimeout(context.WithoutCancel(ctx), cancelGrace)
		defer cancel()
	}
	s.deregister(leaving)
	if failure := s.flush(leaving); failure != nil {
		lost = newError(ErrUnavailable, "Stop: %s; answers may be lost, and the server ends the subscriptions with the connection",
			failure.Message)
	}
	return joinErrors(late, lost)
}

// awaitCancelled gives handlers whose ctx has ended time to return. It waits until finished is closed, or until none has
// returned for cancelGrace, and for returnTimeout at most. running is how many handlers run.
func (s *Service) awaitCancelled(endpoints []*endpoint, finished <-chan struct{}, running int) {
	end := clock() + returnTimeout
	for before := -1; running != before || s.requeueing.Load() > 0; {
		before = running
		select {
		case <-finished:
			return
		case <-time.After(cancelGrace):
			running = s.runningHandlers(endpoints)
		}
		if clock() >= end {
			return
		}
	}
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
