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

// An Option configures a [Service] in [New]. New fails with [ErrInvalid] if the value of an option is invalid. If an option is
// given more than once, the last one counts, except that [WithNATS], [WithHealthCheck], [WithMiddleware] and [WithCallMiddleware]
// add to the earlier ones.
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

// WithURL sets the URLs of the servers to connect to, which are tried in random order. The default is $NATS_URL, in which commas
// separate several URLs, or nats://127.0.0.1:4222 if $NATS_URL is empty. The scheme nats:// may be left out. An empty list is
// invalid, and so is a URL that can't be parsed or has no host.
func WithURL(urls ...string) Option { return func(c *config) { c.urls, c.urlsFrom = urls, "WithURL" } }

// WithNATS adds options of nats.go to every connection, for example credentials, TLS, an in-process server, or event handlers.
// They override the options that aegis sets, with two exceptions. The event handlers of aegis run too, before those given here.
// And the connections of the pool do not buffer what is published while they are disconnected, because it would be sent after its
// caller had given up. An option that returns an error makes New fail with [ErrInvalid].
//
// By default New fails if the servers can't be reached, and a connection that is lost is made again without a limit of
// attempts. With [nats.RetryOnFailedConnect], New does not wait for the servers, but Start does. With [nats.MaxReconnects], a
// connection can be closed for good, which ends [Service.Run].
func WithNATS(opts ...nats.Option) Option {
	return func(c *config) { c.nats = append(c.nats, opts...) }
}

// WithPool sets the number of connections in the pool, 1 to 64. The default is 2. Each connection carries up to 8,192 calls at a
// time, and a further call fails at once with [ErrOverloaded]. An instance that handles events or commands has one more
// connection, for these.
func WithPool(size int) Option { return func(c *config) { c.pool = size } }

// WithID sets the instance's id, to which [ToInstance] can address calls: 1 to 128 letters, digits, - and _. It must be unique
// among the instances of the service. The default is the service's name followed by 8 random hexadecimal digits.
func WithID(id string) Option { return func(c *config) { c.id = &id } }

// WithVersion sets the service's version: three numbers without leading zeros, in the form x.y.z. The default is 0.0.0.
func WithVersion(version string) Option { return func(c *config) { c.version = version } }

// WithMetadata sets the metadata that the instance advertises in the registry. The default is none. The registry entry must not
// be larger than the server's max_payload less 1 KiB.
func WithMetadata(md map[string]string) Option {
	return func(c *config) { c.metadata = maps.Collect(maps.All(md)) }
}

// WithCodec sets the codec in which the service sends requests, events and commands. The default is [MsgPack]. nil is invalid.
// Whatever its codec is, a service also accepts MessagePack and JSON, and answers a request in the format of the request.
func WithCodec(codec Codec) Option { return func(c *config) { c.codec = codec } }

// WithLogger sets the logger. The default is [slog.Default]. nil is invalid; use slog.New(slog.DiscardHandler) to log nothing.
func WithLogger(l *slog.Logger) Option { return func(c *config) { c.logger = l } }

// WithTimeout sets how long a call, or another operation that waits for the server, may take if its ctx has no deadline. It also
// sets how long a handler may run if the request has no deadline, as one from a plain NATS client without the header
// Aegis-Timeout. It must be positive. The default is 5 s.
func WithTimeout(d time.Duration) Option { return func(c *config) { c.timeout = d } }

// WithStopTimeout sets how long [Service.Stop], when [Service.Run] calls it, lets running handlers finish. It must be positive.
// The default is 25 s, which is less than the default grace period of Kubernetes (30 s).
func WithStopTimeout(d time.Duration) Option { return func(c *config) { c.stopTimeout = d } }

// WithConcurrency sets how many messages each handler of this instance works on at once, unless the handler has its own
// [Concurrency]: 1 to 1,048,576. The default is 1,024.
func WithConcurrency(n int) Option { return func(c *config) { c.concurrency = n } }

// WithReplicas sets how many servers of a cluster store each stream and bucket that the service makes, 1 to 5. The default is 1.
// WithReplicas has no effect on streams and buckets that exist.
func WithReplicas(n int) Option { return func(c *config) { c.replicas = n } }

// WithRetention sets the limits of the stream of events, AEGIS_EVENTS, if the service makes it. An event is dropped when it has
// this age, and the oldest events are dropped when the stream would have more than this number of bytes, whether they were
// handled or not. 0 is no limit, and the default for both: the stream then grows until the disk is full. An age that is not 0
// must be at least 1 s. Negative values are invalid. WithRetention has no effect on a stream that exists; set its max_age and
// max_bytes instead (nats stream edit AEGIS_EVENTS --max-age=24h).
func WithRetention(age time.Duration, bytes int64) Option {
	return func(c *config) { c.maxAge, c.maxBytes = age, bytes }
}

// WithHeartbeat sets the interval at which the instance refreshes its registry entry and runs its health checks, at least 1 s.
// The default is 10 s. The entry of an instance that crashed expires after three heartbeats, rounded down to whole seconds.
func WithHeartbeat(interval time.Duration) Option { return func(c *config) { c.heartbeat = interval } }

// WithHealthCheck adds a health check. The check runs at Start, or at the first [Service.Lead], and with each heartbeat
// ([WithHeartbeat]). It fails when fn returns an error, panics, or does not return within one heartbeat, after which fn's ctx
// ends. While any check fails, the instance is UNHEALTHY: it gives up the leadership, takes no events, no commands, and no calls
// except those that are addressed to it, and [Balance] does not choose it. A nil fn is invalid, and so is a name that is empty or
// used twice.
func WithHealthCheck(name string, fn func(context.Context) error) Option {
	return func(c *config) { c.healthChecks = append(c.healthChecks, &healthCheck{name: name, fn: fn}) }
}

// WithHealthTolerance sets how many equal results in a row it takes to change the state of a health check from success to failure
// or back, 1 or more. The default is 1. The first result of a check counts at once. With 3, a single failure or a single success
// changes nothing.
func WithHealthTolerance(n int) Option { return func(c *config) { c.tolerance = n } }

// WithFailover sets how soon the leader of the service's [Exclusive] handlers is replaced when it fails. The default is
// [Balanced]. See [FailoverPolicy] for the values that are valid.
func WithFailover(p FailoverPolicy) Option { return func(c *config) { c.failover = p } }

// WithBreaker puts a circuit breaker in front of each service that this service calls. While it is open, calls to that service
// fail with [ErrCircuitOpen]. The first 1,024 services that are called have a breaker; further ones have none. By default there
// are no breakers.
func WithBreaker(p BreakerPolicy) Option {
	return func(c *config) { c.breaker = BreakerPolicy{cmp.Or(p.Failures, 5), cmp.Or(p.Cooldown, 5*time.Second)} }
}

// WithMiddleware wraps every handler of the service in the given middleware. The first one given is the outermost. nil is
// invalid.
func WithMiddleware(mw ...Middleware) Option {
	return func(c *config) { c.middleware = append(c.middleware, mw...) }
}

// WithCallMiddleware wraps everything that the service sends in the given middleware: each [Call] with all its attempts, the
// call of each instance in a [CallAll], and each [Publish], [PublishBatch], [SendCommand] and [ScheduleCommand]. The first one
// given is the outermost. nil is invalid.
//
// The Kind of the [Message] is "call", "publish" or "send". Its Subject is the subject to which it is sent. Its Source is this
// service. Its Header has the headers that are sent, without those that aegis adds, and must not be changed; to add a header,
// pass a ctx from [WithHeader] to next. Its Data is the encoded value, or nil for a batch. The Data that the middleware passes
// to next is sent, except for a batch. next returns the payload of the answer to a call, and nil for everything else.
//
// If the middleware returns without calling next, nothing is sent. The data that it returns is then the answer to a call, a nil
// error counts as success, and an error has NotRun set.
func WithCallMiddleware(mw ...Middleware) Option {
	return func(c *config) { c.callMiddleware = append(c.callMiddleware, mw...) }
}

// WithWireHeaders makes the service send the deadline of a call, its own name and the correlation id as headers (Aegis-Timeout,
// Aegis-Source, Aegis-Correlation-Id). By default they are parts of the reply subject, which is cheaper. Use WithWireHeaders for
// calls to another account (service imports), because the server replaces the reply subject between accounts. A cancellation does
// not reach a handler in another account.
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
	ok.want(c.id == nil || isToken(*c.id, maxInstance), "WithID(%q): want 1 to %d of a-z, A-Z, 0-9, - and _",
		deref(c.id), maxInstance)
	ok.want(versionPattern.MatchString(c.version), "WithVersion(%q): want x.y.z, such as 1.2.0", c.version)
	ok.want(c.codec != nil, "WithCodec(nil): want a codec, such as aegis.JSON")
	ok.want(c.logger != nil, "WithLogger(nil): want a logger; slog.New(slog.DiscardHandler) logs nothing")
	ok.want(c.tolerance >= 1, "WithHealthTolerance(%d): want 1 or more", c.tolerance)
	ok.want(c.timeout > 0, "WithTimeout(%v): want more than 0", c.timeout)
	ok.want(c.stopTimeout > 0, "WithStopTimeout(%v): want more than 0", c.stopTimeout)
	ok.want(c.concurrency >= 1 && c.concurrency <= maxConcurrency, "WithConcurrency(%d): want 1 to %d",
		c.concurrency, maxConcurrency)
	ok.want(c.replicas >= 1 && c.replicas <= 5, "WithReplicas(%d): want 1 to 5", c.replicas)
	ok.want((c.maxAge == 0 || c.maxAge >= time.Second) && c.maxBytes >= 0,
		"WithRetention(%v, %d): want an age of 1s or more, and bytes; 0 is no limit", c.maxAge, c.maxBytes)
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

// A BreakerPolicy sets when a circuit breaker refuses calls to a service without sending them. After Failures failed calls in a
// row the breaker opens, and refuses all calls for the time of Cooldown. Then it lets one call through as a probe. If the probe
// succeeds the breaker closes; if the probe fails it opens again. A field that is 0 has its default, and a negative one is
// invalid.
//
// A call counts as failed if no handler answered it: because there was no instance, because no answer came in time, or because
// the instance was overloaded or stopping. An error that a handler returns is an answer, and counts as a success. An
// [ErrNotActive], a cancellation by the caller and a lost connection count neither as failures nor as successes.
type BreakerPolicy struct {
	Failures int           // failed calls in a row; the default is 5
	Cooldown time.Duration // how long calls are refused; the default is 5 s
}

// Settings of a handler.

// A HandlerOption configures one handler in [Handle], [Subscribe] or [HandleCommand]. Each of them fails with [ErrInvalid] if the
// value of an option is invalid, or if the option is not for this kind of handler. [Concurrency] and [Exclusive] are for all
// handlers; [Attempts], [Backoff] and [Deadline] are for events and commands; [Broadcast], [Durable] and [FromStart] are for
// events. If an option is given more than once, the last one counts.
type HandlerOption func(*handlerConfig)

type handlerConfig struct {
	kind                            string // of the messages that it handles
	concurrency, attempts           int
	backoff, maxBackoff, deadline   time.Duration
	durable                         *string // nil if Durable was not given
	broadcast, fromStart, exclusive bool
	misplaced                       string // the error text for an option that this kind of handler can't have; "" if there is none
}

// Concurrency sets how many messages the handler works on at once in each instance, 1 to 1,048,576. The default is that of
// [WithConcurrency], which suits handlers that mostly wait. For a handler that computes, about the number of CPUs is best,
// because then excess requests are rejected early. With 1, all instances together handle one event at a time, in the order in
// which the events were stored: an event waits until the one before it is finished, including its further attempts.
func Concurrency(n int) HandlerOption { return func(c *handlerConfig) { c.concurrency = n } }

// Attempts sets how many attempts there are in all, 1 or more, before an event or a command becomes a dead letter. The default
// is 10 for events and 3 for commands. With the default [Backoff], the pauses between 10 attempts take 1.5 minutes on average,
// and 3 minutes at most. While 65,536 messages of one subscription are being handled or wait for their next attempt, the server
// delivers no others to it.
func Attempts(n int) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Attempts(%d)", n), func(c *handlerConfig) { c.attempts = n })
}

// Backoff sets the pause after a failed attempt at an event or a command. The pause is random between 0 and a bound. After the
// first attempt the bound is the parameter first. It doubles after each further attempt, up to the parameter max. Both must be
// positive, and first must not be more than max. The default is Backoff(500*time.Millisecond, time.Minute).
func Backoff(first, max time.Duration) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Backoff(%v, %v)", first, max), func(c *handlerConfig) {
		c.backoff, c.maxBackoff = first, max
	})
}

// Deadline sets how long one attempt at an event or a command may take before its ctx ends. It must be positive. The default is 5
// minutes. A request has the deadline of its caller instead.
func Deadline(d time.Duration) HandlerOption {
	return onlyFor(storedKinds, fmt.Sprintf("Deadline(%v)", d), func(c *handlerConfig) { c.deadline = d })
}

// Broadcast delivers each event to every instance. By default the instances share the events. An instance gets the events from
// its start until it stops. If it has a fixed id ([WithID]) and starts again within an hour after it stopped or crashed, it
// also gets the events that it missed. Broadcast can't be combined with [Exclusive].
func Broadcast() HandlerOption {
	return onlyFor([]string{kindEvent}, "Broadcast()", func(c *handlerConfig) { c.broadcast = true })
}

// Durable sets the name of a subscription: 1 to 64 letters, digits, - and _. By default the pattern is its name, so a second
// subscription of a service to the same pattern needs Durable. A name belongs to its pattern, and can't be used for another
// pattern later.
func Durable(name string) HandlerOption {
	return onlyFor([]string{kindEvent}, fmt.Sprintf("Durable(%q)", name), func(c *handlerConfig) { c.durable = &name })
}

// FromStart makes a new subscription begin with the oldest event of the stream. By default a new subscription begins with the
// first event that is published after the first Start. FromStart has no effect on a subscription that exists.
func FromStart() HandlerOption {
	return onlyFor([]string{kindEvent}, "FromStart()", func(c *handlerConfig) { c.fromStart = true })
}

// Exclusive makes the handler run in one instance of the service only, the leader, which is the same for all exclusive handlers
// of the service. The other instances stand by. An instance that does not lead answers a request with [ErrNotActive], and with
// the leader's id in Details["leader"] if it knows the leader. It gets such a request if the request was addressed to it, or if
// it has just lost the leadership.
//
// The handler's ctx ends when the leadership does. [Term] returns its fencing token: a store that remembers the highest term
// can reject the writes of a former leader that has not noticed yet. If the leadership was lost while the handler ran, the
// caller gets [ErrFenced] instead of the answer, because the effect of the handler may or may not stand. In the same case, an
// event or a command is handled again by the next leader.
//
// If no instance has led the service before, or if the bucket aegis_leaders was lost, the first leader is elected only after the
// Lease of its policy ([WithFailover]), 3 s by default, because an unknown instance may still lead. A test can use a shorter
// policy:
//
//	aegis.WithFailover(aegis.FailoverPolicy{Lease: 400 * time.Millisecond, Valid: 300 * time.Millisecond,
//		Renew: 100 * time.Millisecond, Timeout: 100 * time.Millisecond})
func Exclusive() HandlerOption { return func(c *handlerConfig) { c.exclusive = true } }

// Permanent wraps err in an error by which a handler of events or commands asks for no further attempt: the message becomes a
// dead letter at once. The error has the text of err, and [errors.Is] and [errors.As] find err in it. If err is nil, Permanent
// returns nil. Permanent has no effect in the handler of a call.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// RetryAfter wraps err in an error by which a handler of events or commands asks to be called again after d, for example while a
// bank is closed. That does not count as an attempt, and may be repeated without a limit. If d is not positive, the message is
// handled again at once. The error has the text of err, and [errors.Is] and [errors.As] find err in it. If err is nil, RetryAfter
// returns nil. RetryAfter has no effect inside [Permanent] and in the handler of a call.
//
// An event is stored again, to be delivered when d is over. Therefore it has another Sequence, and other events may be handled
// before it even if [Concurrency] is 1. If an operator has made the stream AEGIS_EVENTS without allow_msg_schedules, or if the
// stream drops messages before d is over, the event is redelivered after d instead, which counts as an attempt.
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

// onlyFor returns an option that only handlers of some kinds of messages can have; for others it sets misplaced. option is the
// option's text.
func onlyFor(kinds []string, option string, set func(*handlerConfig)) HandlerOption {
	return func(c *handlerConfig) {
		if set(c); !slices.Contains(kinds, c.kind) {
			c.misplaced = option + ": this is an option for handlers of " + strings.Join(kinds, "s and ") + "s"
		}
	}
}

// storedKinds has the kinds of messages that a stream keeps, so that they have Attempts and a Deadline. A request has the
// deadline of its caller.
var storedKinds = []string{kindEvent, kindCommand}

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

// A CallOption configures one [Call], [CallAll], [Publish], [PublishBatch], [SendCommand] or [ScheduleCommand]. Each of them
// fails with [ErrInvalid] if the value of an option is invalid, or if the option is not for this function. [ToInstance] and
// [Balance] are for Call, [EventVersion] is for events, [AtPriority] is for commands, and [IdempotencyKey], [At], [After] and
// [ExpireAfter] are for events and commands. If an option is given more than once, the last one counts.
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

// A RetryPolicy sets how often a call is sent, and the pauses between its attempts. The pause after attempt n is random between 0
// and Backoff·2ⁿ⁻¹, and at most MaxBackoff ("full jitter",
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). A field that is 0 has its default, and a negative
// one is invalid.
type RetryPolicy struct {
	Attempts       int           // how many attempts there are in all; the default is 3
	Backoff        time.Duration // the bound of the first pause; the default is 50 ms
	MaxBackoff     time.Duration // the bound of every pause; the default is 1 s
	AttemptTimeout time.Duration // how long one Idempotent attempt waits; the default is 1 s, for PublishBatch that of WithTimeout
}

// Retry sends a call again if it certainly did not reach a handler, which NotRun in an [Error] says, and if its error is
// [ErrUnavailable], [ErrOverloaded], [ErrNotActive] or [ErrCircuitOpen]. By default a call is sent once. Events and commands are
// sent again by default, with the policy RetryPolicy{}, because a duplicate is recognized by its id; Retry then sets another
// policy.
func Retry(p RetryPolicy) CallOption { return func(c *callConfig) { c.retry = &p } }

// Sticky addresses a call to the instance that leads a service with [Exclusive] handlers. A call that did not reach a handler
// is sent again as with [Retry], but without a limit of attempts, until ctx ends, or for [WithTimeout] if ctx has no deadline.
// So the call survives a failover or a restart of the service, for example. Backoff is 10 ms and MaxBackoff is 200 ms, unless
// Retry sets them. A call that may have run fails with [ErrUnavailable] as soon as another instance leads, because its answer
// can no longer come. If the call is also [Idempotent], it is sent to the new leader instead.
func Sticky() CallOption { return func(c *callConfig) { c.sticky = true } }

// Idempotent states that it does no harm if the handler of a call runs twice. The call is then also sent again if no answer has
// come within AttemptTimeout, or if the connection is lost. Without [Retry] or [Sticky], the defaults of [RetryPolicy] apply. For
// events and commands Idempotent has no effect.
func Idempotent() CallOption { return func(c *callConfig) { c.idempotent = true } }

// ToInstance addresses a call to the instance with this id: 1 to 128 letters, digits, - and _. The call fails with
// [ErrUnavailable] if there is no such instance.
func ToInstance(id string) CallOption { return func(c *callConfig) { c.instance = &id } }

// A Strategy is a way to choose the instance to which a call is sent; see [Balance].
type Strategy int

const (
	RoundRobin  Strategy = iota // each instance in turn
	Random                      // a random instance
	LeastLoaded                 // of two random instances the one with fewer running handlers and calls in flight from here
)

// Balance addresses a call to an instance that the strategy chooses. By default NATS chooses an instance at random. Instances
// that are UNHEALTHY or STOPPING are not chosen, and an instance that no longer listens is skipped at once. A call to an
// [Exclusive] handler goes to the leader, whatever the strategy. The call can also fail with the errors of [Service.Discover],
// because the first call with Balance to a service asks the registry.
func Balance(strategy Strategy) CallOption { return func(c *callConfig) { c.strategy = &strategy } }

// EventVersion sets the version of an event in [Publish] and [PublishBatch]: numbers without leading zeros, in the form x.y or
// x.y.z. By default an event has no version.
func EventVersion(v string) CallOption { return func(c *callConfig) { c.version = &v } }

// IdempotencyKey sets the id of an event or a command, so that it can be sent again without effect: 1 to 256 printable ASCII
// characters, no spaces. By default the id is random.
//
// If several commands of the same service and name are sent with the same key, only the first is executed, as long as its outcome
// is kept; see [SendCommand]. If several events of the same domain and type are published with the same key within the duplicate
// window of the stream (2 minutes by default), only the first is stored, and publishing the others succeeds without effect. The
// events of a batch have the keys <k>-0, <k>-1 and so on.
func IdempotencyKey(k string) CallOption { return func(c *callConfig) { c.key = &k } }

// AtPriority sets the priority of a command. The default is [Normal]. Of the commands that wait, the most urgent start first,
// except that one start in 16 is given to the least urgent, so that no command waits forever.
func AtPriority(p Priority) CallOption { return func(c *callConfig) { c.priority = &p } }

// At sets the time t, by the server's clock, at which an event is delivered or a command is executed. If t is in the past, that
// is at once. The server keeps the message until then, so that this process may end. Meanwhile the state of a command is
// scheduled, and the command can be cancelled. Publish and SendCommand fail with [ErrInvalid] if the stream drops its messages
// before that time, or if an operator has made the stream without allow_msg_schedules. At and [After] exclude each other.
func At(t time.Time) CallOption { return func(c *callConfig) { c.at = &t } }

// After is [At] with the time that is d from now. If d is not positive, that is at once.
func After(d time.Duration) CallOption { return func(c *callConfig) { c.after = &d } }

// ExpireAfter sets the time d, at least 1 s, after which an event is no longer delivered, and no attempt at a command begins. d
// counts from the time of [At] or [After], or from when the message is sent if there is none. For a command of [ScheduleCommand],
// d counts from each firing. By default events and commands that are sent do not expire.
//
// For an event, d is rounded up to whole seconds. Publish fails with [ErrInvalid] if an operator has made the stream without
// allow_msg_ttl. A command that has expired has failed with [ErrTimeout], whose Cause is the error of its last attempt if there
// was one. For a command, the clocks of the sender and of the worker count. Events and commands that have expired do not become
// dead letters.
func ExpireAfter(d time.Duration) CallOption { return func(c *callConfig) { c.expire = cmp.Or(d, -1) } }

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
		ok.want(versionPattern.MatchString(*v) || versionPattern.MatchString(*v+".0"),
			"EventVersion(%q): want x.y or x.y.z, such as 1.0",
			*v)
	}
	if k := c.key; k != nil {
		printable := !strings.ContainsFunc(*k, func(r rune) bool { return r <= ' ' || r > '~' })
		ok.want(c.kind != kindRPC, "IdempotencyKey(%q): calls have no key; see Idempotent", *k)
		ok.want(printable && *k != "" && len(*k) <= maxIDLength,
			"IdempotencyKey(%q): want 1 to %d printable ASCII characters, no spaces",
			*k, maxIDLength)
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
