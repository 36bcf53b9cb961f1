package aegis

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"math"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has all settings: what each does, its default, and what is valid. An option only sets; check refuses what is out of
// range, once for each kind of configuration.

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

// WithMetadata adds to what the instance tells about itself in the registry. The entry has to fit the server's max_payload.
func WithMetadata(md map[string]string) Option {
	return func(c *config) { c.metadata = maps.Clone(md) }
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

// WithHeartbeat sets how often the instance refreshes its entry in the registry, and runs its health checks: at least 1 s. The
// default is 10 s. The entry of an instance that crashed expires after three heartbeats, in whole seconds, rounded down.
func WithHeartbeat(interval time.Duration) Option {
	return func(c *config) {
		c.check(interval >= time.Second, "WithHeartbeat(%v): want 1 s or more, since NATS counts in whole seconds", interval)
		c.heartbeat = interval
	}
}

// WithHealthCheck adds a check of the instance's health, which runs at Start and with each heartbeat, and fails when it returns an
// error, or not within a heartbeat; its ctx ends then. While any fails the instance is UNHEALTHY: it gives up the leadership,
// takes no calls, events and commands but those addressed to it, and is not chosen by [Balance]. An empty or repeated name is invalid.
func WithHealthCheck(name string, fn func(context.Context) error) Option {
	return func(c *config) {
		known := slices.ContainsFunc(c.checks, func(h *healthCheck) bool { return h.name == name })
		c.check(name != "" && !known && fn != nil, "WithHealthCheck(%q): want a name of its own, and a function", name)
		c.checks = append(c.checks, &healthCheck{name: name, fn: fn})
	}
}

// WithFailover sets how soon the leader of the service's [Exclusive] handlers is replaced. The default is [Balanced].
func WithFailover(p FailoverPolicy) Option {
	return func(c *config) {
		c.check(p.valid(), "WithFailover(%+v): %s", p, wantPolicy)
		c.failover = p
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

const maxConcurrency = 1 << 20

// Exclusive has the handler run in one instance of the service only, the leader, which is the same for all its exclusive handlers.
// The others stand by. One that gets a request nevertheless, addressed to it or since it has just lost the leadership, answers
// [ErrNotActive], with the leader's id, if it knows it, in Details["leader"].
//
// The handler's ctx ends when the leadership does, and [Term] is its fencing token: a store that remembers the highest one can
// refuse what a former leader still tries, which may not have noticed yet. If the leadership was lost while the handler ran, the
// caller gets [ErrFenced] instead of its answer: it ran, and its effect may or may not stand. An event or a command is given to
// the next leader then; that uses up an attempt only if the server couldn't be told so within 5 s.
func Exclusive() HandlerOption { return func(c *handlerConfig) { c.exclusive = true } }

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

// Broadcast gives each event to every instance, which otherwise share them. An instance that crashes gets what it missed if
// another with its id ([WithID]) starts within an hour; otherwise an instance gets events from its start until it stops.
func Broadcast() HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "Broadcast(): only events can be broadcast")
		c.broadcast = true
	}
}

// Durable names a subscription: letters, digits, - and _, at most 64. It is needed for the second one of a service to the same
// pattern. A name belongs to its pattern; it can't be used for another one later.
func Durable(name string) HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "Durable(%q): only subscriptions to events have a name", name)
		c.check(isToken(name, 64), "Durable(%q): want 1 to 64 of a-z, A-Z, 0-9, - and _", name)
		c.durable = name
	}
}

// FromStart begins a new subscription with the oldest event of the stream. The default is to begin with what is published from
// the first Start on. It has no effect on a subscription that exists.
func FromStart() HandlerOption {
	return func(c *handlerConfig) {
		c.check(c.kind == kindEvent, "FromStart(): only events are kept")
		c.replays = true
	}
}

// A CallOption configures one call.
type CallOption func(*callConfig)

type callConfig struct {
	kind               string // of message
	sticky, idempotent bool
	balanced           bool
	strategy           Strategy
	retry              *RetryPolicy
	instance           string
	version, key       string
	priority           Priority
	err                *Error // of the first option that can't be used
}

func (c *callConfig) check(ok bool, format string, args ...any) {
	if !ok && c.err == nil {
		c.err = notRun(newError(ErrInvalid, format, args...))
	}
}

// callConfigs are those without any option: an event has an id, so that it may be sent again.
var callConfigs = map[string]*callConfig{
	kindRPC:     {kind: kindRPC},
	kindEvent:   {kind: kindEvent, idempotent: true},
	kindCommand: {kind: kindCommand, idempotent: true},
}

func newCallConfig(kind string, opts []CallOption) *callConfig {
	plain := callConfigs[kind]
	if len(opts) == 0 {
		return plain
	}
	cfg := *plain
	for _, opt := range opts {
		opt(&cfg)
	}
	return &cfg
}

// A RetryPolicy says how often and when a call is sent again. The pause before attempt n+1 is random between 0 and
// Backoff·2ⁿ⁻¹, at most MaxBackoff ("full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
// Fields that are 0 have their defaults; negative ones are invalid.
type RetryPolicy struct {
	Attempts       int           // in all; default 3
	Backoff        time.Duration // default 50 ms
	MaxBackoff     time.Duration // default 1 s
	AttemptTimeout time.Duration // of one attempt of an Idempotent call; default 1 s
}

// policy fills in the defaults.
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
	p.Attempts = cmp.Or(p.Attempts, 3)
	if c.sticky {
		p.Attempts = math.MaxInt
	}
	p.Backoff = cmp.Or(p.Backoff, 50*time.Millisecond)
	p.MaxBackoff = cmp.Or(p.MaxBackoff, time.Second)
	p.AttemptTimeout = cmp.Or(p.AttemptTimeout, time.Second)
	return p
}

// Retry sends the call again when it certainly did not reach a handler (NotRun) because its service was unavailable,
// overloaded, without an active instance, or behind an open circuit breaker.
func Retry(p RetryPolicy) CallOption {
	return func(c *callConfig) {
		c.check(p.Attempts >= 0 && p.Backoff >= 0 && p.MaxBackoff >= 0 && p.AttemptTimeout >= 0, "Retry(%+v): negative", p)
		c.retry = &p
	}
}

// Sticky follows the instance that leads a service with [Exclusive] handlers: it addresses that one directly. It keeps at a call that
// did not reach a handler, as [Retry] does, but until ctx ends: through a failover or a restart of the service, say. Its pauses are
// of 10 ms at first and at most 200 ms, unless Retry sets others. Only a call that may have run fails, when its leader dies, unless
// it is [Idempotent] too.
func Sticky() CallOption { return func(c *callConfig) { c.sticky = true } }

// Idempotent is the caller's word that it does no harm if the handler runs twice. The call is then also sent again when an
// answer is missing: after AttemptTimeout, or when the connection is lost. Without [Retry] or [Sticky], Retry's defaults hold.
func Idempotent() CallOption { return func(c *callConfig) { c.idempotent = true } }

// ToInstance addresses the instance with this id.
func ToInstance(id string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindRPC, "ToInstance(%q): only calls are addressed to an instance", id)
		c.check(isToken(id, maxInstance), "ToInstance(%q): want 1 to %d of a-z, A-Z, 0-9, - and _", id, maxInstance)
		c.instance = id
	}
}

// A Strategy says which instance a call goes to; see [Balance].
type Strategy int

const (
	RoundRobin  Strategy = iota // each in turn
	Random                      // any
	LeastLoaded                 // of two random ones that with fewer handlers running and fewer calls from here
)

// Balance addresses the call to an instance chosen by a strategy, where by default NATS chooses at random. An instance that is
// UNHEALTHY or STOPPING is not chosen, one that doesn't listen any more is skipped at once, and calls of an [Exclusive] handler go
// to the leader. The first such call of a service asks the registry, and fails as [Service.Discover] does.
func Balance(strategy Strategy) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindRPC, "Balance(%d): only calls are addressed to an instance", strategy)
		c.check(strategy >= RoundRobin && strategy <= LeastLoaded, "Balance(%d): want RoundRobin, Random or LeastLoaded", strategy)
		c.balanced, c.strategy = true, strategy
	}
}

// EventVersion sets an event's version, x.y or x.y.z. It is for [Publish] and [PublishBatch].
func EventVersion(v string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindEvent, "EventVersion(%q): only events have one", v)
		c.check(versionPattern.MatchString(v) || versionPattern.MatchString(v+".0"), "EventVersion(%q): want x.y or x.y.z, such as 1.0", v)
		c.version = v
	}
}

// IdempotencyKey sets the id of an event or a command, 1 to 256 printable ASCII characters without spaces. Of the commands of
// one service and name that are sent with the same key only the first is executed, as long as its outcome is kept; see
// [SendCommand]. Of the events of one domain and type that are published with the same key within the stream's duplicate window
// (2 minutes by default) only the first is stored; publishing another then succeeds without effect. The events of a batch have
// the keys <k>-0, <k>-1 and so on.
func IdempotencyKey(k string) CallOption {
	return func(c *callConfig) {
		c.check(c.kind != kindRPC, "IdempotencyKey(%q): calls have none; see Idempotent", k)
		printable := !strings.ContainsFunc(k, func(r rune) bool { return r <= ' ' || r > '~' })
		c.check(len(k) >= 1 && len(k) <= maxIDLength && printable, "IdempotencyKey(%q): want 1 to %d printable ASCII characters", k, maxIDLength)
		c.key = k
	}
}

// AtPriority sets a command's priority. The default is [Normal]. Of the commands that wait for an instance, the more urgent
// ones start first, but for one start in 16, so that none waits forever.
func AtPriority(p Priority) CallOption {
	return func(c *callConfig) {
		c.check(c.kind == kindCommand, "AtPriority(%d): only commands have one", p)
		c.check(p >= Normal && p <= Critical, "AtPriority(%d): want Low, Normal, High or Critical", p)
		c.priority = p
	}
}

const maxService, maxInstance = 64, 128 // characters

var versionPattern = regexp.MustCompile(`^(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}$`) // what nats micro accepts
