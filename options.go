package aegis

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has all settings: of a service, of a handler, and of a call. An option stores its value unchecked. For each of the
// three there is one constructor, which applies the options to the defaults, and returns an error for the first setting that is
// invalid.

// Settings of a service.

// An Option configures a [Service] in [New].
type Option func(*config)

type config struct {
	urls           []string
	urlsFrom       string // where urls come from, for error texts
	nats           []nats.Option
	id             *string // nil if WithID was not given
	version        string
	codec          Codec
	logger         *slog.Logger
	breaker        BreakerPolicy // Failures is 0 if there is none
	failover       FailoverPolicy
	metadata       map[string]string // never nil, because that would be null in the answers on $SRV
	healthChecks   []*healthCheck
	middleware     []Middleware
	callMiddleware []Middleware // of WithCallMiddleware
	wireHeaders    bool
	tolerance      int           // of health checks
	maxAge         time.Duration // these two are of the stream of events; 0 is no limit
	maxBytes       int64

	pool, concurrency, replicas     int
	timeout, heartbeat, stopTimeout time.Duration
}

// WithURL sets the servers to connect to, which are tried in random order. If it is given more than once, the last one counts.
// The default is $NATS_URL, in which several URLs are separated by commas, or nats://127.0.0.1:4222 if that is not set. An empty
// list, or a URL that can't be parsed, is invalid.
func WithURL(urls ...string) Option { return func(c *config) { c.urls, c.urlsFrom = urls, "WithURL" } }

// WithNATS adds options of nats.go to every connection: credentials, TLS, an in-process server, event handlers. They override the
// options that aegis sets, with two exceptions: its own event handlers run too, before those given here, and no connection
// buffers what is published while it is disconnected, because that would be sent after its caller had given up.
//
// By default a service reconnects without end, but New fails if the servers can't be reached. With [nats.RetryOnFailedConnect], New
// does not wait for them, and Start does. With [nats.MaxReconnects], a connection can be closed for good, which ends [Service.Run].
func WithNATS(opts ...nats.Option) Option {
	return func(c *config) { c.nats = append(c.nats, opts...) }
}

// WithPool sets the number of connections, 1 to 64. The default is 2. Each connection carries up to 8,192 calls at a time; a call
// beyond that fails at once with [ErrOverloaded].
func WithPool(size int) Option { return func(c *config) { c.pool = size } }

// WithID sets the instance's id, to which [ToInstance] can address calls: 1 to 128 letters, digits, - and _. It must be unique
// among the instances of the service. The default is the service's name followed by 8 random hexadecimal digits.
func WithID(id string) Option { return func(c *config) { c.id = &id } }

// WithVersion sets the service's version, in the form x.y.z. The default is 0.0.0.
func WithVersion(version string) Option { return func(c *config) { c.version = version } }

// WithMetadata sets the metadata that the instance advertises in the registry. The entry has to fit the server's max_payload.
func WithMetadata(md map[string]string) Option {
	return func(c *config) { c.metadata = maps.Collect(maps.All(md)) }
}

// WithCodec sets the codec in which the service sends requests, events and commands. The default is [MsgPack]. A service
// understands MessagePack and JSON in any case, and answers a request in the request's format.
func WithCodec(codec Codec) Option { return func(c *config) { c.codec = codec } }

// WithLogger sets the logger. The default is [slog.Default]. nil is invalid; slog.New(slog.DiscardHandler) logs nothing.
func WithLogger(l *slog.Logger) Option { return func(c *config) { c.logger = l } }

// WithTimeout sets how long a call may take if its ctx has no deadline, and how long a handler may run if its caller sent no
// deadline (as a plain NATS client does without the header Aegis-Timeout). It must be positive. The default is 5 s.
func WithTimeout(d time.Duration) Option { return func(c *config) { c.timeout = d } }

// WithStopTimeout sets how long [Service.Run] lets Stop take to finish what runs. It must be positive. The default is 25 s, which
// is less than the grace period of Kubernetes (30 s).
func WithStopTimeout(d time.Duration) Option { return func(c *config) { c.stopTimeout = d } }

// WithConcurrency sets how many requests each method of this instance handles at once, unless the method has its own
// [Concurrency]: 1 to 1,048,576. The default is 1,024.
func WithConcurrency(n int) Option { return func(c *config) { c.concurrency = n } }

// WithReplicas sets how many servers of a cluster keep each stream and bucket that the service makes, 1 to 5. The default is 1.
// It has no effect on streams and buckets that exist.
func WithReplicas(n int) Option { return func(c *config) { c.replicas = n } }

// WithRetention limits the stream of events that the service makes, AEGIS_EVENTS: an event is dropped at this age, and the oldest
// ones are dropped when all together have that many bytes, whether they were handled or not. 0 is no limit, which is the default
// for both: then the stream grows until the disk is full. The age is at least 1 s. WithRetention has no effect on a stream that
// exists; set its max_age and max_bytes instead (nats stream edit AEGIS_EVENTS --max-age=24h).
func WithRetention(age time.Duration, bytes int64) Option {
	return func(c *config) { c.maxAge, c.maxBytes = age, bytes }
}

// WithHeartbeat sets the interval at which the instance refreshes its entry in the registry and runs its health checks: at least
// 1 s. The default is 10 s. The entry of an instance that crashed expires after three heartbeats, rounded down to whole seconds.
func WithHeartbeat(interval time.Duration) Option { return func(c *config) { c.heartbeat = interval } }

// WithHealthCheck adds a health check. It runs at Start and with each heartbeat. It fails when fn returns an error, or does not
// return within one heartbeat; fn's ctx ends then. While any check fails, the instance is UNHEALTHY: it gives up the leadership,
// it takes only those calls that are addressed to it, no events and no commands, and [Balance] does not choose it. A name that is
// empty or used twice is invalid.
func WithHealthCheck(name string, fn func(context.Context) error) Option {
	return func(c *config) { c.healthChecks = append(c.healthChecks, &healthCheck{name: name, fn: fn}) }
}

// WithHealthTolerance sets how many results in a row of a health check, that differ from its present state, change that state: 1 or
// more. The default is 1. The first result counts at once. With 3, a single failure and a single success change nothing.
func WithHealthTolerance(n int) Option { return func(c *config) { c.tolerance = n } }

// WithFailover sets how soon the leader of the service's [Exclusive] handlers is replaced when it fails. The default is
// [Balanced].
func WithFailover(p FailoverPolicy) Option { return func(c *config) { c.failover = p } }

// WithBreaker puts a circuit breaker in front of each service that is called, up to 1,024 services; calls to others are not held
// up. By default there is none.
func WithBreaker(p BreakerPolicy) Option {
	return func(c *config) { c.breaker = BreakerPolicy{cmp.Or(p.Failures, 5), cmp.Or(p.Cooldown, 5*time.Second)} }
}

// WithMiddleware wraps every handler of the service. The first one given is the outermost.
func WithMiddleware(mw ...Middleware) Option {
	return func(c *config) { c.middleware = append(c.middleware, mw...) }
}

// WithCallMiddleware wraps everything that the service sends: each [Call], with all its attempts, each instance's part of a
// [CallAll], each [Publish], [PublishBatch] and [SendCommand]. The first one given is the outermost.
//
// The Kind of the Message is "call", "publish" or "send". Subject is where it is sent, Source is this service, and Header has what
// is sent besides what aegis adds; it must not be changed. [WithHeader] adds headers to the ctx that is passed to next. Data is
// the encoded value, nil for a batch; what is passed to next is sent, except in a batch. next returns the payload of the answer to
// a call, and nil otherwise.
//
// If the middleware returns without calling next, nothing is sent: its data is the answer of a call, a nil error counts as success,
// and an error has NotRun set.
func WithCallMiddleware(mw ...Middleware) Option {
	return func(c *config) { c.callMiddleware = append(c.callMiddleware, mw...) }
}

// WithWireHeaders makes the service send the deadline, its name and the correlation id of a call as headers (Aegis-Timeout,
// Aegis-Source, Aegis-Correlation-Id). By default they travel in the reply subject, which is cheaper. Use it for calls to another
// account, because the server replaces the reply subject between accounts (service imports). A cancellation does not reach a
// handler in another account.
func WithWireHeaders() Option { return func(c *config) { c.wireHeaders = true } }

const (
	maxService, maxInstance = 64, 128 // characters of a name, and of an instance's id
	maxConcurrency          = 1 << 20
)

var versionPattern = regexp.MustCompile(`^(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}$`) // the versions x.y.z that nats micro accepts

func newConfig(opts []Option) (*config, *Error) {
	c := &config{
		urls: strings.Split(cmp.Or(os.Getenv("NATS_URL"), nats.DefaultURL), ","), urlsFrom: "$NATS_URL: WithURL",
		tolerance: 1, version: "0.0.0", codec: MsgPack, logger: slog.Default(), failover: Balanced, metadata: map[string]string{},
		pool: 2, concurrency: 1024, replicas: 1, timeout: 5 * time.Second, heartbeat: 10 * time.Second, stopTimeout: 25 * time.Second,
	}
	for _, opt := range opts {
		opt(c)
	}
	var ok checks
	ok.want(len(c.urls) > 0, "WithURL(): no URL given")
	ok.want(c.pool >= 1 && c.pool <= 64, "WithPool(%d): want 1 to 64 connections", c.pool)
	ok.want(c.id == nil || isToken(*c.id, maxInstance), "WithID(%q): want 1 to %d of a-z, A-Z, 0-9, - and _", deref(c.id), maxInstance)
	ok.want(versionPattern.MatchString(c.version), "WithVersion(%q): want x.y.z, such as 1.2.0", c.version)
	ok.want(c.codec != nil, "WithCodec(nil): want a codec, such as aegis.JSON")
	ok.want(c.logger != nil, "WithLogger(nil): want a logger; slog.New(slog.DiscardHandler) logs nothing")
	ok.want(c.tolerance >= 1, "WithHealthTolerance(%d): want 1 or more", c.tolerance)
	ok.want(c.timeout > 0, "WithTimeout(%v): want more than 0", c.timeout)
	ok.want(c.stopTimeout > 0, "WithStopTimeout(%v): want more than 0", c.stopTimeout)
	ok.want(c.concurrency >= 1 && c.concurrency <= maxConcurrency, "WithConcurrency(%d): want 1 to %d", c.concurrency, maxConcurrency)
	ok.want(c.replicas >= 1 && c.replicas <= 5, "WithReplicas(%d): want 1 to 5", c.replicas)
	ok.want((c.maxAge == 0 || c.maxAge >= time.Second) && c.maxBytes >= 0, "WithRetention(%v, %d): want an age of 1s or more, and bytes; 0 is no limit", c.maxAge, c.maxBytes)
	ok.want(c.heartbeat >= time.Second, "WithHeartbeat(%v): want at least 1s, because NATS counts whole seconds", c.heartbeat)
	ok.want(c.failover.valid(), "WithFailover(%+v): %s", c.failover, wantPolicy)
	ok.want(c.breaker.Failures >= 0 && c.breaker.Cooldown >= 0, "WithBreaker(%+v): negative", c.breaker)
	isNil := func(m Middleware) bool { return m == nil }
	ok.want(!slices.ContainsFunc(c.middleware, isNil), "WithMiddleware(nil): want a function")
	ok.want(!slices.ContainsFunc(c.callMiddleware, isNil), "WithCallMiddleware(nil): want a function")
	for _, u := range c.urls {
		full := u
		if !strings.Contains(u, "://") {
			full = "nats://" + u
		}
		p, err := url.Parse(full)
		ok.want(err == nil && p.Host != "", "%s(%q): not a server's URL, such as nats://host:4222", c.urlsFrom, u)
	}
	names := map[string]bool{"": true}
	for _, h := range c.healthChecks {
		ok.want(!names[h.name] && h.fn != nil, "WithHealthCheck(%q): want a name that no other check has, and a function", h.name)
		names[h.name] = true
	}
	return c, ok.failure
}

// checks keeps the error for the first setting that is invalid.
type checks struct{ failure *Error }

// want notes an error, with the text of format and args, if ok is false and no earlier want has noted one.
func (c *checks) want(ok bool, format string, args ...any) {
	if !ok && c.failure == nil {
		c.failure = notRun(newError(ErrInvalid, format, args...))
	}
}

// A BreakerPolicy says when a circuit breaker refuses calls to a service without sending them: after Failures failed calls in a
// row, for the time of Cooldown. Then one call is let through as a probe, and its result decides whether others may follow. A
// call counts as failed if no handler answered it: there was no instance, no answer in time, or the instance was overloaded or
// stopping. An error that a handler returns is an answer, and counts as a success. NOT_ACTIVE, the caller's own cancellation and
// a lost connection count neither as failures nor as successes. Fields that are 0 have their defaults; negative ones are invalid.
type BreakerPolicy struct {
	Failures int           // default 5
	Cooldown time.Duration // default 5 s
}

// Settings of a handler.

// A HandlerOption configures one handler, in [Handle], [Subscribe] or [HandleCommand].
type HandlerOption func(*handlerConfig)

type handlerConfig struct {
	kind                            string // of the messages that it handles
	concurrency, attempts           int
	backoff, maxBackoff, deadline   time.Duration
	durable                         *string // nil if Durable was not given
	broadcast, fromStart, exclusive bool
	misplaced                       string // the error text for an option that this kind of handler can't have; "" if there is none
}

// Concurrency sets how many messages the handler works on at once in each instance, 1 to 1,048,576. The default is the service's
// [WithConcurrency], which suits handlers that wait for something. For a handler that computes, about the number of CPUs is best,
// because then excess load is shed early. With 1, events are handled in the order in which they were stored, by all instances
// together: an event waits until the one before it is finished, retries included.
func Concurrency(n int) HandlerOption { return func(c *handlerConfig) { c.concurrency = n } }

// Attempts sets how often an event or a command is tried, 1 or more in all, before it becomes a dead letter. The default is 10 for
// events, which with the default [Backoff] span up to 3 minutes, 1.5 on average. It is 3 for commands. At most 65,536 messages of a
// subscription are being handled or wait for their next attempt; beyond that it gets no others.
func Attempts(n int) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Attempts(%d)", n), func(c *handlerConfig) { c.attempts = n })
}

// Backoff sets the pause after a failed attempt at an event or a command. The pause is random, between 0 and a bound. The bound
// is first after the first attempt, and doubles with each further one, up to max. Both must be positive, and first at most max.
// The default is Backoff(500*time.Millisecond, time.Minute).
func Backoff(first, max time.Duration) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Backoff(%v, %v)", first, max), func(c *handlerConfig) { c.backoff, c.maxBackoff = first, max })
}

// Deadline sets how long one attempt at an event or a command may take before its ctx ends. It must be positive. The default is 5
// minutes. (A request has its caller's deadline.)
func Deadline(d time.Duration) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Deadline(%v)", d), func(c *handlerConfig) { c.deadline = d })
}

// Broadcast delivers each event to every instance; by default the instances share the events. An instance that crashed gets the
// events that it missed if one with the same id ([WithID]) starts within an hour. Otherwise an instance gets the events from its
// start until it stops.
func Broadcast() HandlerOption {
	return onlyFor("events", "Broadcast()", func(c *handlerConfig) { c.broadcast = true })
}

// Durable names a subscription: 1 to 64 letters, digits, - and _. The second subscription of a service to the same pattern needs
// a name. A name belongs to its pattern and can't be used for another one later.
func Durable(name string) HandlerOption {
	return onlyFor("events", fmt.Sprintf("Durable(%q)", name), func(c *handlerConfig) { c.durable = &name })
}

// FromStart begins a new subscription with the oldest event of the stream. By default it begins with the first event that is
// published after the first Start. FromStart has no effect on a subscription that exists.
func FromStart() HandlerOption {
	return onlyFor("events", "FromStart()", func(c *handlerConfig) { c.fromStart = true })
}

// Exclusive makes the handler run in one instance of the service only, the leader, which is the same for all exclusive handlers
// of the service. The other instances stand by. An instance that gets a request without being the leader, because the request was
// addressed to it or because it has just lost the leadership, answers [ErrNotActive], with the leader's id in Details["leader"]
// if it is known.
//
// The handler's ctx ends when the leadership does. [Term] is its fencing token: a store that remembers the highest term can
// reject the writes of a former leader that has not noticed yet. If the leadership was lost while the handler ran, the caller
// gets [ErrFenced] instead of the answer: the handler ran, and its effect may or may not stand. An event or a command is given to
// the next leader then.
//
// If nobody has led the service before, or the bucket aegis_leaders was lost, the first leader is elected only after the Lease of its
// policy, 3 s by default, because an instance that is not known may still lead. A test need not wait that long:
//
//	aegis.WithFailover(aegis.FailoverPolicy{Lease: 400 * time.Millisecond, Valid: 300 * time.Millisecond,
//		Renew: 100 * time.Millisecond, Timeout: 100 * time.Millisecond})
func Exclusive() HandlerOption { return func(c *handlerConfig) { c.exclusive = true } }

// Permanent returns an error for a handler of events or commands to return: there is no other attempt, and the message becomes a
// dead letter at once. It wraps err, so that [errors.Is] and [errors.As] see it, and has its text. It is nil if err is nil. In
// answers to calls it has no effect.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// RetryAfter returns an error for a handler of events or commands to return: the message is handled again after d, and that uses
// up no attempt, for example while a bank is closed. There is no limit to how often. A d that is not positive means at once. It
// wraps err, so that [errors.Is] and [errors.As] see it, and has its text. It is nil if err is nil. Inside of [Permanent], and in
// answers to calls, it has no effect.
//
// An event is stored anew for that time, so that it has another Sequence, and others may be handled before it even if [Concurrency]
// is 1. If the stream AEGIS_EVENTS was made by somebody else without allow_msg_schedules, or drops messages before that time, the
// event is redelivered after d, which counts as an attempt.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &retryError{err, max(d, 0)}
}

type retryError struct {
	error
	pause time.Duration
}

func (e *retryError) Unwrap() error { return e.error }

// onlyFor returns an option that only handlers of some kinds of messages can have; for others it sets misplaced. kinds names them
// in words that contain their constants, as "events and commands" contains kindEvent. option is the option's text.
func onlyFor(kinds, option string, set func(*handlerConfig)) HandlerOption {
	return func(c *handlerConfig) {
		if set(c); !strings.Contains(kinds, c.kind) {
			c.misplaced = option + ": this is an option for handlers of " + kinds
		}
	}
}

// storedKinds names the kinds of messages that a stream keeps, so that they have Attempts and a Deadline. A request has its
// caller's deadline.
const storedKinds = "events and commands"

func (s *Service) newHandlerConfig(kind string, opts []HandlerOption) (*handlerConfig, *Error) {
	c := &handlerConfig{
		kind: kind, concurrency: s.cfg.concurrency, attempts: map[string]int{kindRPC: 1, kindEvent: 10, kindCommand: 3}[kind],
		backoff: 500 * time.Millisecond, maxBackoff: time.Minute, deadline: 5 * time.Minute,
	}
	for _, opt := range opts {
		opt(c)
	}
	var ok checks
	ok.want(c.misplaced == "", "%s", c.misplaced)
	ok.want(c.concurrency >= 1 && c.concurrency <= maxConcurrency, "Concurrency(%d): want 1 to %d", c.concurrency, maxConcurrency)
	ok.want(c.attempts >= 1, "Attempts(%d): want 1 or more", c.attempts)
	ok.want(c.backoff > 0 && c.backoff <= c.maxBackoff, "Backoff(%v, %v): want 0 < first <= max", c.backoff, c.maxBackoff)
	ok.want(c.deadline > 0, "Deadline(%v): want more than 0", c.deadline)
	ok.want(c.durable == nil || isToken(*c.durable, 64), "Durable(%q): want 1 to 64 of a-z, A-Z, 0-9, - and _", deref(c.durable))
	ok.want(!c.broadcast || !c.exclusive, "Broadcast() is for all instances and Exclusive() for one: choose one of them")
	return c, ok.failure
}

// Settings of a call.

// A CallOption configures one [Call], [Publish], [PublishBatch] or [SendCommand].
type CallOption func(*callConfig)

type callConfig struct {
	kind               string // of the message that is sent
	sticky, idempotent bool
	retry              *RetryPolicy // this and the fields below are nil if their option was not given (but see callConfigs)
	instance           *string
	strategy           *Strategy
	version, key       *string
	priority           *Priority
	at                 *time.Time
	after              *time.Duration
	expire             time.Duration // 0 if ExpireAfter was not given
	patience           time.Duration // the AttemptTimeout, unless Retry sets one; 0 for the default
}

// A RetryPolicy says how often, and after which pauses, a call is sent again. The pause before attempt n+1 is random between 0
// and Backoff·2ⁿ⁻¹, at most MaxBackoff ("full jitter",
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). Fields that are 0 have their defaults; negative
// ones are invalid.
type RetryPolicy struct {
	Attempts       int           // in all; default 3
	Backoff        time.Duration // default 50 ms
	MaxBackoff     time.Duration // default 1 s
	AttemptTimeout time.Duration // of one attempt of an Idempotent call; default 1 s
}

// Retry sends a call again if it certainly did not reach a handler (NotRun) because the service was unavailable, overloaded,
// without an active instance, or behind an open circuit breaker.
func Retry(p RetryPolicy) CallOption { return func(c *callConfig) { c.retry = &p } }

// Sticky addresses a call to the instance that leads a service with [Exclusive] handlers. A call that did not reach a handler is
// sent again as with [Retry], but until ctx ends: through a failover or a restart of the service, for example. Backoff is 10 ms
// and MaxBackoff 200 ms, unless Retry sets others. A call that may have run fails with [ErrUnavailable] as soon as another instance
// leads, because its answer can't come any more. If it is [Idempotent] too, it is sent to the new leader.
func Sticky() CallOption { return func(c *callConfig) { c.sticky = true } }

// Idempotent states that it does no harm if the handler runs twice. The call is then also sent again when its answer is missing:
// after AttemptTimeout, or when the connection is lost. Without [Retry] or [Sticky], the defaults of Retry apply.
func Idempotent() CallOption { return func(c *callConfig) { c.idempotent = true } }

// ToInstance addresses a call to the instance with this id.
func ToInstance(id string) CallOption { return func(c *callConfig) { c.instance = &id } }

// A Strategy chooses the instance that a call goes to; see [Balance].
type Strategy int

const (
	RoundRobin  Strategy = iota // each instance in turn
	Random                      // any instance
	LeastLoaded                 // of two random instances the one with fewer running handlers and calls that are addressed to it from here
)

// Balance addresses a call to an instance that the strategy chooses; by default NATS chooses one at random. Instances that are
// UNHEALTHY or STOPPING are not chosen, and one that does not listen any more is skipped at once. Calls to an [Exclusive] handler
// go to the leader. The first such call to a service asks the registry, and fails as [Service.Discover] does.
func Balance(strategy Strategy) CallOption { return func(c *callConfig) { c.strategy = &strategy } }

// EventVersion sets the version of an event in [Publish] and [PublishBatch], in the form x.y or x.y.z.
func EventVersion(v string) CallOption { return func(c *callConfig) { c.version = &v } }

// IdempotencyKey sets the id of an event or a command: 1 to 256 printable ASCII characters, no spaces.
//
// Of the commands of one service and name that are sent with the same key, only the first is executed for as long as its outcome
// is kept; see [SendCommand]. Of the events of one domain and type that are published with the same key within the stream's
// duplicate window (2 minutes by default), only the first is stored, and publishing another one succeeds without effect. The
// events of a batch have the keys <k>-0, <k>-1 and so on.
func IdempotencyKey(k string) CallOption { return func(c *callConfig) { c.key = &k } }

// AtPriority sets a command's priority. The default is [Normal]. Of the commands that wait for an instance the more urgent ones
// start first, except that one start in 16 goes to the least urgent, so that none waits forever.
func AtPriority(p Priority) CallOption { return func(c *callConfig) { c.priority = &p } }

// At has an event delivered, or a command executed, at the time t, or at once if t is in the past. The server keeps it until then, so
// that this process may end. A command can be cancelled until then; its state is scheduled. Publish and SendCommand fail with
// [ErrInvalid] if the stream drops its messages before that time, and if the stream was made by somebody else without
// allow_msg_schedules. The time is that of the server's clock.
func At(t time.Time) CallOption { return func(c *callConfig) { c.at = &t } }

// After is [At] with the time d from now.
func After(d time.Duration) CallOption { return func(c *callConfig) { c.after = &d } }

// ExpireAfter keeps an event from being delivered, or delivered again, when d is over, and a command from being begun, or begun
// again. It counts from the time of [At] or [After], or else from when it is sent. d is at least 1 s.
//
// For an event, d is rounded up to whole seconds. One that expired is no dead letter. Publish fails with [ErrInvalid] if the stream
// was made by somebody else without allow_msg_ttl. A command that expired has failed with [ErrTimeout], whose Cause is the error
// of its last attempt if there was one; it becomes no dead letter. Its time is that of the clocks of sender and worker.
func ExpireAfter(d time.Duration) CallOption {
	return func(c *callConfig) { c.expire = cmp.Or(d, -1) }
}

// due returns the time of At or After. It is zero if there is none, or if that is over.
func (c *callConfig) due() time.Time {
	var due time.Time
	switch {
	case c.after != nil:
		due = time.Now().Add(*c.after)
	case c.at != nil:
		due = *c.at
	}
	if time.Until(due) <= 0 {
		return time.Time{}
	}
	return due
}

const maxIDLength = 256 // bytes of an idempotency key

// callConfigs has the settings of a call without options, by the kind of its message. Nobody changes them. Sending an event or a
// command is idempotent, because a duplicate is recognized by its id.
var callConfigs = map[string]*callConfig{
	kindRPC:     {kind: kindRPC},
	kindEvent:   {kind: kindEvent, idempotent: true},
	kindCommand: {kind: kindCommand, idempotent: true, priority: new(Priority)},
}

func newCallConfig(kind string, opts []CallOption) (*callConfig, *Error) {
	if len(opts) == 0 {
		return callConfigs[kind], nil
	}
	c := new(*callConfigs[kind])
	for _, opt := range opts {
		opt(c)
	}
	var ok checks
	if p := c.retry; p != nil {
		ok.want(p.Attempts >= 0 && p.Backoff >= 0 && p.MaxBackoff >= 0 && p.AttemptTimeout >= 0, "Retry(%+v): negative", *p)
	}
	if id := c.instance; id != nil {
		ok.want(c.kind == kindRPC, "ToInstance(%q): only calls are addressed to an instance", *id)
		ok.want(isToken(*id, maxInstance), "ToInstance(%q): want 1 to %d of a-z, A-Z, 0-9, - and _", *id, maxInstance)
	}
	if s := c.strategy; s != nil {
		ok.want(c.kind == kindRPC, "Balance(%d): only calls are addressed to an instance", *s)
		ok.want(*s >= RoundRobin && *s <= LeastLoaded, "Balance(%d): want RoundRobin, Random or LeastLoaded", *s)
	}
	if v := c.version; v != nil {
		ok.want(c.kind == kindEvent, "EventVersion(%q): only events have a version", *v)
		ok.want(versionPattern.MatchString(*v) || versionPattern.MatchString(*v+".0"), "EventVersion(%q): want x.y or x.y.z, such as 1.0", *v)
	}
	if k := c.key; k != nil {
		printable := !strings.ContainsFunc(*k, func(r rune) bool { return r <= ' ' || r > '~' })
		ok.want(c.kind != kindRPC, "IdempotencyKey(%q): calls have no key; see Idempotent", *k)
		ok.want(printable && *k != "" && len(*k) <= maxIDLength, "IdempotencyKey(%q): want 1 to %d printable ASCII characters, no spaces", *k, maxIDLength)
	}
	if c.at != nil || c.after != nil {
		ok.want(c.kind != kindRPC, "At and After: only events and commands are sent for later")
		ok.want(c.at == nil || c.after == nil, "At and After: choose one of them")
	}
	if d := c.expire; d != 0 {
		ok.want(c.kind != kindRPC, "ExpireAfter(%v): only events and commands expire; a call has the deadline of its ctx", d)
		ok.want(d >= time.Second, "ExpireAfter(%v): want 1s or more", max(d, 0))
	}
	if p := c.priority; p != nil {
		ok.want(c.kind == kindCommand, "AtPriority(%d): only commands have a priority", *p)
		ok.want(*p >= Normal && *p <= Critical, "AtPriority(%d): want Low, Normal, High or Critical", *p)
	}
	return c, ok.failure
}

// policy returns the retry policy that follows from Retry, Sticky and Idempotent.
func (c *callConfig) policy() RetryPolicy {
	p := RetryPolicy{Attempts: 1}
	switch {
	case c.retry != nil:
		p = *c.retry
	case c.sticky:
		p = RetryPolicy{Backoff: 10 * time.Millisecond, MaxBackoff: 200 * time.Millisecond}
	case c.idempotent:
		p = RetryPolicy{}
	}
	if c.sticky {
		p.Attempts = math.MaxInt
	}
	return RetryPolicy{
		Attempts: cmp.Or(p.Attempts, 3), Backoff: cmp.Or(p.Backoff, 50*time.Millisecond),
		MaxBackoff: cmp.Or(p.MaxBackoff, time.Second), AttemptTimeout: cmp.Or(p.AttemptTimeout, c.patience, time.Second),
	}
}

// deref returns the string that p points to, "" for nil.
func deref(p *string) string { return *cmp.Or(p, new(string)) }
