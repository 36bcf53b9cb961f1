package aegis

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nats.go/micro"
)

// This file is how services find out about each other. Each running instance has an entry in the bucket aegis_registry, which it
// refreshes with each heartbeat and which expires after three (Instance). Whoever calls a service keeps a local copy of the entries
// (Discover, Watch), from which it chooses (Balance). At the end are the $SRV subjects of NATS services.

// An Instance is what a running instance of a service tells about itself. Maps and slices in it are shared, and must not be changed.
type Instance struct {
	Service  string            `json:"service"`
	ID       string            `json:"id"`
	Version  string            `json:"version"`
	Status   string            `json:"status"` // ACTIVE; STANDBY: another one leads; UNHEALTHY: a health check fails; STOPPING
	Metadata map[string]string `json:"metadata,omitempty"`

	Endpoints []Endpoint `json:"endpoints,omitempty"` // by Kind, then Name
	Load      int        `json:"load"`                // handlers running when it was written
	Started   time.Time  `json:"started"`
	Seen      time.Time  `json:"-"` // when the server stored it
}

// An Endpoint is a handler of an [Instance].
type Endpoint struct {
	Kind      string `json:"kind"` // "rpc", "event" or "command"
	Name      string `json:"name"`
	Subject   string `json:"subject"`
	Exclusive bool   `json:"exclusive,omitempty"`
}

// The states of an instance.
const (
	statusActive    = "ACTIVE"
	statusStandby   = "STANDBY"
	statusUnhealthy = "UNHEALTHY"
	statusStopping  = "STOPPING"
)

const (
	registryBucket = "aegis_registry"
	registryPrefix = "$KV." + registryBucket + "."
	markerTTL      = time.Hour // of what tells that an entry expired
)

func (s *Service) registryStream() jetstream.StreamConfig {
	config := s.bucket(registryBucket)
	config.AllowMsgTTL, config.SubjectDeleteMarkerTTL = true, markerTTL
	return config
}

// Discover lists the instances of a service, by id; none if there is no such service. The first call for a service asks the server,
// until ctx ends or for [WithTimeout]. Later ones answer from a copy that is kept up to date; while there is no connection, it stays
// as it is. Errors: [ErrInvalid] for a name that is out of range, [ErrUnavailable] without connection or JetStream at first,
// [ErrDenied] by the server's permissions, [ErrTimeout], [ErrCanceled], [ErrClosed].
func (s *Service) Discover(ctx context.Context, service string) ([]Instance, error) {
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return nil, failure
	}
	return slices.Clone(d.view().instances), nil
}

// Watch yields the instances of a service as [Service.Discover] lists them, then again whenever one comes or goes, or its status,
// metadata, or endpoints change. It ends when ctx ends; or with an error, of Discover's, if it can't begin or the service is stopped.
func (s *Service) Watch(ctx context.Context, service string) iter.Seq2[[]Instance, error] {
	return func(yield func([]Instance, error) bool) {
		d, failure := s.discover(ctx, service)
		if failure != nil {
			yield(nil, failure)
			return
		}
		var last []Instance
		for first := true; ; first = false {
			changed := d.nextChange()
			now := d.view().instances
			if (first || !slices.EqualFunc(last, now, sameButSeen)) && !yield(slices.Clone(now), nil) {
				return
			}
			last = now
			select {
			case <-changed:
			case <-ctx.Done():
				return
			case <-s.base.Done():
				yield(nil, s.closedError())
				return
			}
		}
	}
}

// sameButSeen tells that a and b differ in nothing but what each heartbeat changes.
func sameButSeen(a, b Instance) bool {
	a.Load, a.Seen = b.Load, b.Seen
	return reflect.DeepEqual(a, b)
}

// discover is the directory of a service, filled.
func (s *Service) discover(ctx context.Context, service string) (*directory, *Error) {
	if !isName(service, maxService) {
		return nil, notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d", service, maxService))
	}
	d := s.directories.get(service, func() *directory {
		d := &directory{watch: newWatch(s, registryBucket, service+".*", func(key string, i *Instance) bool {
			return i.Service == service && i.Service+"."+i.ID == key && isToken(i.ID, maxInstance)
		})}
		d.latest.Store(&view{version: ^uint64(0)}) // none yet
		return d
	})
	return d, d.wait(ctx)
}

// A directory is the local copy of a service's entries, and what follows from them.
type directory struct {
	*watch[Instance]
	latest atomic.Pointer[view]
}

// A view is what a directory shows at a moment.
type view struct {
	version   uint64 // of the watch
	instances []Instance
	served    map[string]*served       // by subject
	calls     map[string]*atomic.Int64 // from here, running, by instance
}

// served is what listens on a subject.
type served struct {
	exclusive bool
	by        []peer         // those that may be chosen
	turn      *atomic.Uint32 // of RoundRobin
}

// A peer is an instance that may be called.
type peer struct {
	subject string
	load    int
	calls   *atomic.Int64 // see view
}

// view is made anew after each change, when somebody looks.
func (d *directory) view() *view {
	last := d.latest.Load()
	version := d.version.Load()
	if last.version == version {
		return last
	}
	v := &view{version: version, instances: []Instance{}, served: map[string]*served{}, calls: map[string]*atomic.Int64{}}
	for _, e := range d.all() {
		e.value.Seen = e.created
		v.instances = append(v.instances, e.value)
	}
	slices.SortFunc(v.instances, func(a, b Instance) int { return cmp.Compare(a.ID, b.ID) })
	for _, i := range v.instances {
		v.calls[i.ID] = cmp.Or(last.calls[i.ID], &atomic.Int64{})
		for _, e := range i.Endpoints {
			sv := v.served[e.Subject]
			if sv == nil {
				sv = &served{turn: &atomic.Uint32{}}
				if old := last.served[e.Subject]; old != nil {
					sv.turn = old.turn
				}
				v.served[e.Subject] = sv
			}
			sv.exclusive = sv.exclusive || e.Exclusive
			if i.Status != statusUnhealthy && i.Status != statusStopping {
				sv.by = append(sv.by, peer{e.Subject + "." + i.ID, i.Load, v.calls[i.ID]})
			}
		}
	}
	d.latest.Store(v)
	return v
}

// choose is the place of the peer that a call goes to.
func (sv *served) choose(by []peer, strategy Strategy) int {
	switch strategy {
	case RoundRobin:
		return int(sv.turn.Add(1) % uint32(len(by)))
	case LeastLoaded:
		i := rand.IntN(len(by))
		j := (i + 1 + rand.IntN(max(len(by)-1, 1))) % len(by) // another one, if there is
		if a, b := by[i], by[j]; a.calls.Load()+int64(a.load) > b.calls.Load()+int64(b.load) {
			return j
		}
		return i
	}
	return rand.IntN(len(by))
}

// requestAny sends a call to an instance chosen by a strategy, and to the next one if that doesn't listen any more.
func (s *Service) requestAny(ctx context.Context, x *exchange, service string, strategy Strategy) (*nats.Msg, *Error) {
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return nil, notRun(failure)
	}
	shared := x.subject
	defer func() { x.subject = shared }()
	sv := d.view().served[shared]
	if sv == nil || sv.exclusive {
		return s.request(ctx, x) // the leader alone listens
	}
	for by := sv.by; len(by) > 0; {
		i := sv.choose(by, strategy)
		p := by[i]
		x.subject = p.subject
		p.calls.Add(1)
		answer, failure := s.request(ctx, x)
		p.calls.Add(-1)
		if failure != errNoResponders {
			return answer, failure
		}
		by = slices.Delete(slices.Clone(by), i, i+1)
	}
	x.subject = shared
	return s.request(ctx, x)
}

const explainTimeout = time.Second

// explainNoResponders returns the error of a call that found no responders: why nobody has subscribed to the subject of x, or to that
// subject of an instance.
func (s *Service) explainNoResponders(ctx context.Context, x *exchange, service, instance string) *Error {
	who, where := service, x.subject
	if instance != "" {
		who, where = "instance "+instance+" of "+service, x.subject+"."+instance
	}
	info, failure := s.info(ctx, service, instance)
	switch {
	case failure == errNoResponders:
		return notRun(newError(ErrUnavailable, "no responders on %s: %s is not running", where, who))
	case failure != nil:
		return notRun(newError(ErrUnavailable, "no responders on %s, and the reason is unknown: %s", where, failure.Message))
	}
	i := slices.IndexFunc(info.Endpoints, func(e micro.EndpointInfo) bool { return e.Subject == x.subject })
	switch {
	case i < 0:
		return notRun(newError(ErrUnimplemented, "%s (version %s) has no handler for %s", info.ID, info.Version, x.subject))
	case info.Endpoints[i].Metadata["exclusive"] != "" && instance == "":
		return notRun(newError(ErrNotActive, "no responders on %s: no instance of %s leads at present", x.subject, service))
	}
	return notRun(newError(ErrUnavailable, "no responders on %s: %s is starting or stopping, or has crashed", where, who))
}

// unhandled reports whether instances of a service run and none of them handles the command with this subject. It is false if that
// can't be found out. Only of a service that runs does it begin a copy of the registry.
func (s *Service) unhandled(ctx context.Context, service, subject string) bool {
	ctx, cancel := context.WithTimeout(ctx, explainTimeout)
	defer cancel()
	if s.directories.all()[service] == nil {
		if _, failure := s.info(ctx, service, ""); failure != nil {
			return false
		}
	}
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return false
	}
	v := d.view()
	return len(v.instances) > 0 && v.served[subject] == nil
}

// info asks an instance of a service about itself, or any instance if none is given. For a minute it does not ask again what was
// denied, because each denial is logged, here and by the server.
func (s *Service) info(ctx context.Context, service, instance string) (*micro.Info, *Error) {
	x := &exchange{subject: "$SRV.INFO." + service}
	if instance != "" {
		x.subject += "." + instance
	}
	if denied := s.denials.since(clock()-time.Minute, toPublish+x.subject); denied != nil {
		return nil, denied
	}
	answer, failure := s.request(ctx, x.within(ctx, explainTimeout))
	if failure != nil {
		return nil, failure
	}
	info := &micro.Info{}
	if err := json.Unmarshal(answer.Data, info); err != nil {
		return nil, newError(ErrInternal, "the answer of %s is not an info: %v", x.subject, err)
	}
	return info, nil
}

// A healthCheck is one of WithHealthCheck.
type healthCheck struct {
	name    string
	fn      func(context.Context) error
	running atomic.Bool
	failure atomic.Pointer[Error] // nil while it succeeds
}

// checkHealth begins all checks but those that still run, which fail. The channel is closed when all are through.
func (s *Service) checkHealth() <-chan struct{} {
	var all sync.WaitGroup
	for _, h := range s.cfg.healthChecks {
		if !h.running.CompareAndSwap(false, true) {
			h.failure.Store(newError(ErrTimeout, "it has not returned for %v", s.cfg.heartbeat))
			s.updateHealth()
			continue
		}
		run := func() {
			defer all.Done()
			defer s.updateHealth()
			defer h.running.Store(false)
			defer func() {
				if p := recover(); p != nil {
					h.failure.Store(newError(ErrInternal, "panic: %v", p))
				}
			}()
			ctx, cancel := context.WithTimeout(s.base, s.cfg.heartbeat)
			defer cancel()
			h.failure.Store(asError(h.fn(ctx)))
		}
		all.Add(1)
		if !s.startTask(run) {
			all.Done()
		}
	}
	return closedAfter(all.Wait)
}

// updateHealth notes whether the instance is well, and what follows from that.
func (s *Service) updateHealth() {
	s.healthMu.Lock()
	defer s.healthMu.Unlock()
	unhealthy := false
	for _, h := range s.cfg.healthChecks {
		if failure := h.failure.Load(); failure != nil {
			unhealthy = true
			if !s.unhealthy.Load() {
				s.log.Warn("a health check fails", "check", h.name, "error", failure)
			}
		}
	}
	if s.unhealthy.Swap(unhealthy) == unhealthy {
		return
	}
	if !unhealthy {
		s.log.Info("all health checks succeed again")
	}
	s.mu.Lock()
	for c := range s.candidates {
		signal(c.nudge)
	}
	s.mu.Unlock()
	s.changed()
}

// changed is called when the instance has become a leader or none, or well or unwell.
func (s *Service) changed() {
	s.shareAll()
	signal(s.entryChanged)
}

// instance is this one's entry.
func (s *Service) instance() Instance {
	i := Instance{
		Service: s.name, ID: s.id, Version: s.cfg.version, Status: statusActive, Metadata: s.cfg.metadata,
		Endpoints: []Endpoint{},
		Started:   s.since,
	}
	exclusive := false
	for _, e := range s.handlers() {
		exclusive = exclusive || e.lease != nil
		i.Endpoints = append(i.Endpoints, Endpoint{e.kind, e.name, e.subject, e.lease != nil})
		i.Load += int(e.meter.inFlight.Load())
	}
	slices.SortFunc(i.Endpoints, func(a, b Endpoint) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
	switch {
	case s.quitting.Err() != nil:
		i.Status = statusStopping
	case s.unhealthy.Load():
		i.Status = statusUnhealthy
	case exclusive && !s.IsLeader():
		i.Status = statusStandby
	}
	return i
}

// writeEntry writes the entry, and announces it to those that listen.
func (s *Service) writeEntry(ctx context.Context, verb string) *Error {
	data, _ := json.Marshal(s.instance()) // it can't fail: what a user put in is strings
	x := &exchange{subject: registryPrefix + s.name + "." + s.id, data: data, header: nats.Header{}}
	ttl := 3 * s.cfg.heartbeat
	if verb == "unregister" { // the entry gives way to a marker, which goes too
		x.data, ttl = nil, markerTTL
		x.header["KV-Operation"], x.header["Nats-Rollup"] = []string{"PURGE"}, []string{"sub"}
	}
	x.header[jetstream.MsgTTLHeader] = []string{strconv.Itoa(int(ttl / time.Second))}
	_, failure := s.store(ctx, x.within(ctx, min(s.cfg.timeout, s.cfg.heartbeat)), s.registryStream())
	s.notify("service."+s.name+"."+verb, data) // whom it may concern
	return failure
}

// register enters the instance into the registry, and keeps it there until leave. Without JetStream it does without.
func (s *Service) register(ctx context.Context) *Error {
	s.mu.Lock()
	if s.state == stopping {
		defer s.mu.Unlock()
		return newError(ErrClosed, "Start: service %s was stopped", s.name)
	}
	s.mayBeKnown = true
	s.heartbeating.Add(1)
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.registered, cancel)()
	failure := s.patiently(ctx, func(ctx context.Context) *Error {
		if _, failure := s.openStream(ctx, s.registryStream(), registryPrefix+">"); failure != nil {
			return failure
		}
		return s.writeEntry(ctx, "register")
	})
	if failure != nil && failure.Code != ErrUnavailable.Code {
		s.heartbeating.Done()
		return failure
	}
	go func() {
		defer s.heartbeating.Done()
		s.beat(failure)
	}()
	return nil
}

// beat refreshes the entry with each heartbeat, and when it changes.
func (s *Service) beat(failure *Error) {
	tick := time.NewTicker(s.cfg.heartbeat)
	defer tick.Stop()
	for troubled := false; ; {
		var again <-chan time.Time
		if failure != nil && !troubled {
			s.log.Warn("the registry can't be reached: others don't see this instance as it is", "error", failure)
		}
		if troubled = failure != nil; troubled && failure.Code == ErrTimeout.Code {
			again = time.After(time.Second)
		}
		select {
		case <-tick.C:
			s.checkHealth()
		case <-s.entryChanged:
		case <-again:
		case <-s.registered.Done():
			return
		}
		failure = s.writeEntry(s.base, "heartbeat")
	}
}

// deregister takes the entry out of the registry, if it may be there, after what beat may be writing.
func (s *Service) deregister(ctx context.Context) {
	s.mu.Lock()
	known := s.mayBeKnown
	s.mu.Unlock()
	s.unregister()
	select {
	case <-closedAfter(s.heartbeating.Wait): // at the latest when base ends
	case <-ctx.Done():
	}
	if known {
		_ = s.writeEntry(ctx, "unregister") // else it expires
	}
}

// answerSurvey answers $SRV.PING, $SRV.INFO and $SRV.STATS, so that `nats micro` shows the instance.
func (s *Service) answerSurvey(m *nats.Msg) {
	if m.Reply == "" {
		return
	}
	identity := micro.ServiceIdentity{Name: s.name, ID: s.id, Version: s.cfg.version, Metadata: map[string]string{}}
	maps.Copy(identity.Metadata, s.cfg.metadata)
	var answer any
	switch verb, _, _ := strings.Cut(strings.TrimPrefix(m.Subject, "$SRV."), "."); verb {
	case micro.PingVerb.String():
		answer = micro.Ping{ServiceIdentity: identity, Type: micro.PingResponseType}
	case micro.InfoVerb.String():
		info := micro.Info{ServiceIdentity: identity, Type: micro.InfoResponseType, Endpoints: []micro.EndpointInfo{}}
		for _, e := range s.instance().Endpoints {
			about := map[string]string{"kind": e.Kind, "name": e.Name}
			if e.Exclusive {
				about["exclusive"] = "true"
			}
			info.Endpoints = append(info.Endpoints, micro.EndpointInfo{Name: microName(e.Name), Subject: e.Subject, QueueGroup: s.name, Metadata: about})
		}
		answer = info
	case micro.StatsVerb.String():
		answer = s.microStats(identity)
	default:
		return
	}
	data, _ := json.Marshal(answer) // strings and numbers: it can't fail
	err := m.Respond(data)
	if st, ok := answer.(micro.Stats); ok && errors.Is(err, nats.ErrMaxPayload) { // tell at least the usual
		for _, e := range st.Endpoints {
			e.Data = nil
		}
		data, _ = json.Marshal(st)
		err = m.Respond(data)
	}
	if err != nil {
		s.log.Warn("an answer was lost", "endpoint", m.Subject, "error", err)
	}
}

func (s *Service) microStats(identity micro.ServiceIdentity) micro.Stats {
	st := micro.Stats{ServiceIdentity: identity, Type: micro.StatsResponseType, Started: s.since.UTC(), Endpoints: []*micro.EndpointStats{}}
	for _, r := range s.readings() {
		if r.Kind == kindCall {
			continue
		}
		e := &micro.EndpointStats{
			Name: microName(r.Name), Subject: r.subject, QueueGroup: s.name,
			NumRequests: int(r.Requests), NumErrors: int(r.Errors),
			ProcessingTime: r.sum, AverageProcessingTime: r.sum / time.Duration(max(r.handled, 1)),
		}
		if r.last != nil {
			e.LastError = *r.last
		}
		e.Data, _ = json.Marshal(r) // strings and numbers: it can't fail
		st.Endpoints = append(st.Endpoints, e)
	}
	return st
}

// microName is a name in which no .*> are: order.* is order-ANY.
func microName(name string) string { return strings.NewReplacer(".", "-", "*", "ANY", ">", "ALL").Replace(name) }
