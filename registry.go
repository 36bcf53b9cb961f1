package aegis

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

// This file has the registry, by which services find each other. Each running instance has an entry in the bucket aegis_registry.
// It refreshes the entry with each heartbeat, and the entry expires after three heartbeats. A service that calls another one
// keeps a local copy of the other's entries (Discover, Watch), from which Balance chooses an instance. At the end of the file are
// the heartbeats, and the answers on the $SRV subjects of NATS services.

// An Instance is the registry entry of a running instance of a service. The instance claims what the entry says; it is not
// authenticated. The maps and slices of an Instance are shared and must not be changed.
type Instance struct {
	Service string `json:"service"`
	ID      string `json:"id"`
	Version string `json:"version"`

	// Status is STOPPING once Stop has begun, UNHEALTHY while a health check fails, STANDBY if the instance has exclusive handlers
	// and does not lead, or else ACTIVE. Discover and Watch show at most one of the instances with exclusive handlers as ACTIVE,
	// and only while its lease lasts.
	Status   string            `json:"status"`
	Metadata map[string]string `json:"metadata,omitempty"`

	Endpoints []Endpoint `json:"endpoints,omitempty"` // sorted by Kind, then by Name
	Load      int        `json:"load"`                // the number of running handlers when the entry was written
	Started   time.Time  `json:"started"`             // when New made the instance, by its own clock
	Seen      time.Time  `json:"-"`                   // when the server stored the entry, by the server's clock
}

// exclusive reports whether the instance has exclusive handlers.
func (i *Instance) exclusive() bool {
	return slices.ContainsFunc(i.Endpoints, func(e Endpoint) bool { return e.Exclusive })
}

// An Endpoint describes a handler of an [Instance].
type Endpoint struct {
	Kind      string `json:"kind"`                // "rpc", "event" or "command"
	Name      string `json:"name"`                // the method, the command, or the subscription
	Subject   string `json:"subject"`             // the subject or the pattern of subjects that it handles
	Exclusive bool   `json:"exclusive,omitempty"` // whether the handler has the option Exclusive
}

const (
	statusActive, statusStandby, statusUnhealthy, statusStopping = "ACTIVE", "STANDBY", "UNHEALTHY", "STOPPING"

	registryBucket = "aegis_registry"
	registryPrefix = "$KV." + registryBucket + "."
	markerTTL      = time.Hour    // how long the marker of an entry that was deleted or has expired stays in the bucket
	infoSubject    = "$SRV.INFO." // followed by what info asks
	lookupTimeout  = time.Second  // for a lookup that only makes an error more exact: who leads, or why nobody responds
)

// A directory is the local copy of a service's entries.
type directory struct {
	*watch[member]
	service    string
	heartbeats atomic.Uint64               // counts all changes of entries
	latest     atomic.Pointer[snapshot]    // nil before the first snapshot is made
	leaders    atomic.Pointer[leaderWatch] // nil before an instance has exclusive handlers; held by run
}

// A member is an entry of a directory. What each heartbeat changes in it is in its vitals.
type member struct {
	Instance
	vitals *vitals
}

// vitals are shared by the entries of an instance that differ in nothing else.
type vitals struct {
	load atomic.Int64
	seen atomic.Int64 // in ns since 1970, by the server's clock
}

// A snapshot is what the entries of a directory say at one version of the directory, with one leader. Only the turns of its
// routes and its listing change, and the next snapshot goes on with the same turns.
type snapshot struct {
	version uint64
	leader  string
	members []*member         // sorted by id
	routes  map[string]*route // by subject
	listing atomic.Pointer[listing]
}

// A listing has the instances of a snapshot, sorted by id, as they were at one count of heartbeats.
type listing struct {
	heartbeats uint64
	instances  []Instance
}

// A route has the instances that handle what is sent to a subject.
type route struct {
	exclusive bool
	targets   []*member      // those that Balance may choose
	turn      *atomic.Uint32 // counts the choices by RoundRobin
}

// A tally counts the calls in flight from this service to each instance that they are addressed to.
type tally struct {
	mu     sync.Mutex     // guards counts
	counts map[string]int // by <service>.<instance>; there is no entry for 0
}

func (t *tally) add(key string, n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts = map[string]int{}
	}
	if t.counts[key] += n; t.counts[key] == 0 {
		delete(t.counts, key)
	}
}

func (t *tally) get(key string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts[key]
}

// Discover returns the instances of a service, sorted by id. The list is empty if the service has no instances. The first call
// for a service asks the server, and blocks until ctx ends or, if ctx has no deadline, for [WithTimeout]. Later calls use a
// local copy, which is kept up to date until it has not been used for a minute. While there is no connection, the copy stays as
// it is. When the connection is back, or when the bucket aegis_registry was lost, an instance that does not refresh its entry
// stays in the copy for another three heartbeats.
//
// The list may be out of date: an instance that has crashed stays in it until three heartbeats have passed.
//
// Errors:
//   - [ErrInvalid] if the name of the service is invalid
//   - [ErrUnavailable] if the first call finds no connection or no JetStream
//   - [ErrOverloaded] if the server's max_subscriptions is reached, or if more than 1,024 services are looked up at once
//   - [ErrDenied] if the server's permissions do not allow it
//   - [ErrTimeout] or [ErrCanceled] if the first call is not answered before ctx ends or, if ctx has no deadline, within
//     WithTimeout
//   - [ErrClosed] after Stop
func (s *Service) Discover(ctx context.Context, service string) ([]Instance, error) {
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return nil, failure
	}
	return d.instances(d.snapshot()), nil
}

// Watch yields the instances of a service as [Service.Discover] returns them. It yields them again whenever an instance comes or
// goes, or when an instance's status, metadata or endpoints change. Between changes Watch blocks. When ctx ends, the loop ends
// without an error. If an error occurs, Watch yields it and ends.
//
// Errors:
//   - those of Discover if Watch can't get the first list
//   - [ErrClosed] when this service is stopped
func (s *Service) Watch(ctx context.Context, service string) iter.Seq2[[]Instance, error] {
	return func(yield func([]Instance, error) bool) {
		var last *snapshot // nil before the first list
		for {
			d, failure := s.discover(ctx, service)
			if failure != nil {
				yield(nil, failure)
				return
			}
			if last == nil {
				if !d.use.hold() { // it has just ended
					continue
				}
				defer d.use.release()
			}
			changed, leaderChanged, lapsed := d.nextChanges()
			now := d.snapshot()
			if (last == nil || !slices.EqualFunc(last.members, now.members, sameMember)) && !yield(d.instances(now), nil) {
				return
			}
			last = now
			select {
			case <-changed:
			case <-leaderChanged:
			case <-lapsed:
			case <-s.base.Done(): // discover returns the error
			case <-ctx.Done():
				return
			}
		}
	}
}

// equalIgnoringHeartbeat reports whether a and b differ only in what every heartbeat changes.
func equalIgnoringHeartbeat(a, b Instance) bool {
	a.Load, a.Seen = b.Load, b.Seen
	return reflect.DeepEqual(a, b)
}

// sameMember reports whether a and b differ only in what every heartbeat changes.
func sameMember(a, b *member) bool { return a.vitals == b.vitals && a.Status == b.Status }

func (s *Service) newDirectory(service string) *directory {
	d := &directory{service: service}
	d.watch = newWatch(s, registryBucket, service+".*", func(key string, m *member) bool {
		return m.Service == service && m.Service+"."+m.ID == key && isToken(m.ID, maxInstance)
	}, d.adopt)
	return d
}

// adopt gives the new entry of an instance the vitals of the old one if nothing else has changed.
func (d *directory) adopt(old, now *entry[member]) (same bool) {
	same = old != nil && equalIgnoringHeartbeat(old.value.Instance, now.value.Instance)
	v := &vitals{}
	if same {
		v = old.value.vitals
	}
	v.load.Store(int64(now.value.Load))
	v.seen.Store(now.created.UnixNano())
	now.value.vitals = v
	d.heartbeats.Add(1)
	return same
}

// instances returns a copy of the instances in a snapshot, sorted by id.
func (d *directory) instances(now *snapshot) []Instance {
	heartbeats := d.heartbeats.Load() // before the vitals, so that no change is missed
	list := now.listing.Load()
	if list == nil || list.heartbeats != heartbeats {
		list = &listing{heartbeats, make([]Instance, len(now.members))}
		for i, m := range now.members {
			list.instances[i] = m.Instance
			list.instances[i].Load, list.instances[i].Seen = int(m.vitals.load.Load()), time.Unix(0, m.vitals.seen.Load()).UTC()
		}
		now.listing.Store(list)
	}
	return slices.Clone(list.instances)
}

// discover returns the directory of a service after it has been filled.
func (s *Service) discover(ctx context.Context, service string) (*directory, *Error) {
	if !isName(service, maxService) {
		return nil, notRun(newError(ErrInvalid, "service %q: want a letter, then letters, digits, - and _, at most %d",
			service, maxService))
	}
	d := s.directories.get(service)
	if failure := d.wait(ctx); failure != nil {
		return d, failure
	}
	if d.latest.Load() == nil {
		d.snapshot() // the first one follows the leader if there are exclusive handlers, and so sets d.leaders
	}
	if w := d.leaders.Load(); w != nil && !w.ready.Load() {
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		defer cancel()
		_ = w.wait(ctx) // if this fails, the entries themselves have to say who leads
	}
	return d, nil
}

// run keeps the directory up to date until ctx ends or the service is stopped.
func (d *directory) run(ctx context.Context) {
	d.watch.run(ctx)
	d.unfollowLeader()
}

// nextChanges returns channels that receive something when the snapshot may have changed.
func (d *directory) nextChanges() (changed, leaderChanged <-chan struct{}, lapsed <-chan time.Time) {
	if w := d.leaders.Load(); w != nil {
		leaderChanged = w.nextChange()
		if leader, until := w.leaderNow(); leader != "" {
			lapsed = time.After(until - clock())
		}
	}
	return d.nextChange(), leaderChanged, lapsed
}

const unknownLeader = "?" // stands for the leader if the leaders' bucket can't be read; no instance has this id

// snapshot returns the latest snapshot. It makes a new one if the directory, or the leader, has changed.
func (d *directory) snapshot() *snapshot {
	last, version, leader := d.latest.Load(), d.version.Load(), unknownLeader
	if w := d.leaders.Load(); w != nil && w.ready.Load() {
		leader, _ = w.leaderNow()
	}
	if last != nil && last.version == version && last.leader == leader {
		return last
	}
	last = cmp.Or(last, &snapshot{})
	now := &snapshot{version: version, leader: leader, routes: map[string]*route{}}
	entries := d.all()
	slices.SortFunc(entries, func(a, b entry[member]) int { return cmp.Compare(a.value.ID, b.value.ID) })
	if leader == unknownLeader { // take the instance with exclusive handlers whose entry was the last to say ACTIVE
		latest := uint64(0)
		for _, e := range entries {
			if e.value.Status == statusActive && e.value.exclusive() && e.revision > latest {
				latest, leader = e.revision, e.value.ID
			}
		}
	}
	exclusive := false
	for _, e := range entries {
		m := &e.value
		if m.exclusive() {
			exclusive = true
			if m.Status == statusActive && m.ID != leader {
				m.Status = statusStandby
			}
		}
		now.members = append(now.members, m)
		for _, e := range m.Endpoints {
			r := now.routes[e.Subject]
			if r == nil {
				old := cmp.Or(last.routes[e.Subject], &route{turn: &atomic.Uint32{}})
				r = &route{turn: old.turn}
				now.routes[e.Subject] = r
			}
			r.exclusive = r.exclusive || e.Exclusive
			if m.Status != statusUnhealthy && m.Status != statusStopping {
				r.targets = append(r.targets, m)
			}
		}
	}
	d.latest.Store(now)
	if exclusive && d.leaders.Load() == nil {
		d.followLeader()
	}
	return now
}

// followLeader sets d.leaders, unless d has ended.
func (d *directory) followLeader() {
	w := d.svc.elections.hold(d.service + "." + defaultGroup)
	if !d.leaders.CompareAndSwap(nil, w) {
		w.use.release()
	} else if d.use.used.Load() == usageEnded {
		d.unfollowLeader()
	}
}

func (d *directory) unfollowLeader() {
	if w := d.leaders.Swap(nil); w != nil {
		w.use.release()
	}
}

// requestAny sends a call to an instance that the strategy chooses. If that instance no longer listens, requestAny lets the
// strategy choose among the others. If none is left, it sends the call to the subject that all instances share.
func (s *Service) requestAny(ctx context.Context, x *exchange, service string, strategy Strategy) (*nats.Msg, *Error) {
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return nil, notRun(failure)
	}
	r := cmp.Or(d.snapshot().routes[x.subject], &route{})
	for targets := r.targets; len(targets) > 0 && !r.exclusive; {
		i := s.choose(r, targets, strategy)
		answer, failure := s.requestFrom(ctx, x, service, targets[i].ID)
		if failure != errNoResponders {
			return answer, failure
		}
		targets = slices.Delete(slices.Clone(targets), i, i+1)
	}
	return s.request(ctx, x) // if the handler is exclusive, only the leader listens on the shared subject
}

// choose returns the index of the target that a call goes to.
func (s *Service) choose(r *route, targets []*member, strategy Strategy) int {
	n := len(targets)
	i := rand.IntN(n)
	switch strategy {
	case RoundRobin:
		return int(r.turn.Add(1) % uint32(n))
	case LeastLoaded:
		j := (i + 1 + rand.IntN(max(n-1, 1))) % n // another target, if there is one
		load := func(t *member) int { return int(t.vitals.load.Load()) + s.inFlight.get(t.Service+"."+t.ID) }
		if load(targets[i]) > load(targets[j]) {
			return j
		}
	}
	return i
}

// explainNoResponders returns the error of a call that found no responders. The error says why nobody has subscribed to the
// subject of x or, if an instance is given, to that instance's own subject.
func (s *Service) explainNoResponders(ctx context.Context, x *exchange, service, instance string) *Error {
	who, asked, subject := service, service, x.subject
	if instance != "" {
		who = "instance " + instance + " of " + service
		asked += "." + instance
		subject += "." + instance
	}
	kind, reason := ErrUnavailable, who+" is starting or stopping, or has crashed"
	info, failure := s.info(ctx, asked)
	if ago := s.sinceReconnect(); failure == errNoResponders && ago < reconnectTime {
		reason = fmt.Sprintf("%s is not running, or has not reconnected yet: this instance did so %v ago",
			who, ago.Round(time.Millisecond))
	} else if failure == errNoResponders {
		reason = who + " is not running"
	} else if failure != nil {
		reason = "the reason is unknown: " + failure.Message
	} else if i := slices.IndexFunc(info.Endpoints, func(e micro.EndpointInfo) bool { return e.Subject == x.subject }); i < 0 {
		kind, reason = ErrUnimplemented, info.ID+" (version "+info.Version+") has no handler for this subject"
	} else if instance == "" && info.Endpoints[i].Metadata["exclusive"] != "" {
		kind, reason = ErrNotActive, "no instance of "+service+" leads at present"
	}
	return notRun(newError(kind, "no responders on %s: %s", subject, reason))
}

const reconnectTime = 10 * time.Second // for other services to reconnect to a server after this one

// sinceReconnect returns how long ago a connection of the pool was made again after a loss.
func (s *Service) sinceReconnect() time.Duration {
	latest := -reconnectTime
	for _, c := range s.conns {
		if c.reconnects.Load() > 0 {
			latest = max(latest, time.Duration(c.connectedAt.Load()))
		}
	}
	return clock() - latest
}

// unhandled reports whether instances of a service are running and none of them handles the command with this subject. It reports
// true only after lookupTimeout, because an instance that has just added the handler may not have registered it yet. It reports
// false if it can't find out. It starts a copy of the service's entries only if the service is running.
func (s *Service) unhandled(caller context.Context, service, subject string) bool {
	ctx, cancel := context.WithTimeout(caller, lookupTimeout)
	defer cancel()
	if _, known := s.directories.watches.Load(service); !known {
		if _, failure := s.info(ctx, service); failure != nil {
			return false
		}
	}
	d, failure := s.discover(ctx, service)
	if failure != nil {
		return false
	}
	for now := d.snapshot(); len(now.members) > 0 && now.routes[subject] == nil; now = d.snapshot() {
		if !sleep(ctx, 10*time.Millisecond) {
			return caller.Err() == nil
		}
	}
	return false
}

// info asks an instance for its $SRV.INFO. asked is "<service>" for any instance of it, or "<service>.<instance>". If the server
// has denied the request, info does not ask again for a minute, because both this service and the server log each denial.
func (s *Service) info(ctx context.Context, asked string) (*micro.Info, *Error) {
	x := &exchange{subject: infoSubject + asked}
	if denied := s.denials.since(clock()-time.Minute, toPublish+x.subject); denied != nil {
		return nil, denied
	}
	answer, failure := s.request(ctx, x.within(ctx, lookupTimeout))
	if failure != nil {
		return nil, failure
	}
	info := &micro.Info{}
	if err := json.Unmarshal(answer.Data, info); err != nil {
		return nil, newError(ErrInternal, "the answer of %s is not an info: %v", x.subject, err)
	}
	return info, nil
}

// statusChanged has to be called after the instance has become healthy or unhealthy, or has won or lost the leadership. The
// endpoints and the registry entry follow the change.
func (s *Service) statusChanged() {
	s.shareAll()
	signal(s.entryChanged)
}

// instance returns what the entry of this instance has to say now.
func (s *Service) instance() Instance {
	i := Instance{Service: s.name, ID: s.id, Version: s.cfg.version, Metadata: *s.metadata.Load(), Started: s.since}
	i.Status = statusActive
	for _, e := range s.allEndpoints() {
		i.Endpoints = append(i.Endpoints, Endpoint{e.kind, e.name, e.subject, e.candidate != nil})
		i.Load += int(e.meter.inFlight.Load())
	}
	slices.SortFunc(i.Endpoints, func(a, b Endpoint) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name)) })
	switch {
	case s.quitting.Err() != nil:
		i.Status = statusStopping
	case s.unhealthy.Load():
		i.Status = statusUnhealthy
	case i.exclusive() && !s.IsLeader():
		i.Status = statusStandby
	}
	return i
}

func (s *Service) registryStream() jetstream.StreamConfig {
	config := s.bucket(registryBucket)
	config.AllowMsgTTL, config.SubjectDeleteMarkerTTL = true, markerTTL
	return config
}

// SetMetadata replaces the metadata that the instance advertises, which [WithMetadata] has set before. It does not wait until the
// registry has the new metadata.
//
// Errors:
//   - [ErrInvalid] if the registry entry would be larger than the server's max_payload less 1 KiB
//   - [ErrClosed] after Stop
func (s *Service) SetMetadata(md map[string]string) error {
	if s.quitting.Err() != nil {
		return newError(ErrClosed, "SetMetadata: service %s was stopped", s.name)
	}
	return s.setMetadata("SetMetadata", md)
}

func (s *Service) setMetadata(verb string, md map[string]string) error {
	md = maps.Collect(maps.All(md))
	next := s.instance()
	next.Metadata = md
	data, _ := json.Marshal(next) // can't fail, because it is strings and numbers
	if most := s.maxPayload() - entryRoom; int64(len(data)) > most {
		return newError(ErrInvalid, "%s: the registry entry would have %d bytes, more than the %d that the server's max_payload leaves",
			verb, len(data), most)
	}
	s.metadata.Store(&md)
	signal(s.entryChanged)
	return nil
}

const entryRoom = 1 << 10 // bytes of max_payload that an entry leaves free, for headers and for what changes in it

// writeEntry writes the entry of this instance, or deletes it if verb is "unregister". It also publishes the instance on
// service.<name>.<verb>, for whoever listens there.
func (s *Service) writeEntry(ctx context.Context, verb string) *Error {
	data, _ := json.Marshal(s.instance()) // can't fail, because what the user has set in it is strings
	x := &exchange{subject: registryPrefix + s.name + "." + s.id, data: data, header: nats.Header{}}
	ttl := 3 * s.cfg.heartbeat
	if verb == "unregister" { // a marker replaces the entry, and expires too
		x.data, ttl = nil, markerTTL
		x.header["KV-Operation"], x.header["Nats-Rollup"] = []string{"PURGE"}, []string{"sub"}
	}
	x.header[jetstream.MsgTTLHeader] = []string{strconv.Itoa(int(ttl / time.Second))}
	_, failure := s.store(ctx, x.within(ctx, min(s.cfg.timeout, s.cfg.heartbeat)), s.registryStream())
	s.notify("service."+s.name+"."+verb, data)
	return failure
}

// register writes the entry of this instance and starts the heartbeats, which go on until deregister. If there is no JetStream,
// or the server can't be reached, register returns nil all the same, and the heartbeats go on trying.
func (s *Service) register(ctx context.Context) error {
	if !s.unlessStopping(func() {
		s.mayBeRegistered.Store(true)
		s.heartbeating.Add(1)
	}) {
		return newError(ErrClosed, "Start: service %s was stopped", s.name)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.heartbeatCtx, cancel)()
	_, failure := s.openStream(ctx, s.registryStream(), registryPrefix+">")
	if failure == nil {
		failure = s.retryTimeouts(ctx, func(ctx context.Context) *Error { return s.writeEntry(ctx, "register") })
	}
	if failure != nil && failure.Code != ErrUnavailable.Code {
		s.heartbeating.Done()
		return failure
	}
	go s.sendHeartbeats(failure)
	return nil
}

// sendHeartbeats writes the entry with each heartbeat, and when the entry changes, until deregister. failure is the result of the
// first write, which register has made. After a timeout it tries again in a second, because the servers may only be electing a
// leader.
func (s *Service) sendHeartbeats(failure *Error) {
	defer s.heartbeating.Done()
	tick := time.NewTicker(s.cfg.heartbeat)
	defer tick.Stop()
	for failing := false; ; failure = s.writeEntry(s.base, "heartbeat") {
		if failure != nil && !failing {
			s.log.Warn("the registry entry can't be written: other services see an old state of this instance, or none",
				"error", failure)
		}
		failing = failure != nil
		var retry <-chan time.Time
		if failing && failure.Code == ErrTimeout.Code {
			retry = time.After(time.Second)
		}
		select {
		case <-tick.C:
		case <-s.entryChanged:
		case <-retry:
		case <-s.heartbeatCtx.Done():
			return
		}
	}
}

// deregister ends the heartbeats and deletes the entry of this instance, if there may be one. If that fails, the entry expires.
func (s *Service) deregister(ctx context.Context) {
	s.endHeartbeats()
	select {
	case <-closedAfter(s.heartbeating.Wait): // a heartbeat may be in flight; it ends at the latest when base does
	case <-ctx.Done():
	}
	if s.mayBeRegistered.Load() {
		_ = s.writeEntry(ctx, "unregister")
	}
}

// answerSurvey answers $SRV.PING, $SRV.INFO and $SRV.STATS, so that the nats tool (nats micro) shows the instance.
func (s *Service) answerSurvey(m *nats.Msg) {
	if m.Reply == "" {
		return
	}
	identity := micro.ServiceIdentity{Name: s.name, ID: s.id, Version: s.cfg.version, Metadata: *s.metadata.Load()}
	var answer any
	switch verb, _, _ := strings.Cut(strings.TrimPrefix(m.Subject, "$SRV."), "."); verb {
	case micro.PingVerb.String():
		answer = micro.Ping{ServiceIdentity: identity, Type: micro.PingResponseType}
	case micro.InfoVerb.String():
		info := micro.Info{ServiceIdentity: identity, Type: micro.InfoResponseType, Endpoints: []micro.EndpointInfo{}}
		for _, e := range s.instance().Endpoints {
			md := map[string]string{"kind": e.Kind, "name": e.Name}
			if e.Exclusive {
				md["exclusive"] = "true"
			}
			endpoint := micro.EndpointInfo{Name: microName(e.Name), Subject: e.Subject, QueueGroup: s.name, Metadata: md}
			info.Endpoints = append(info.Endpoints, endpoint)
		}
		answer = info
	case micro.StatsVerb.String():
		answer = s.microStats(identity)
	default:
		return
	}
	data, _ := json.Marshal(answer) // can't fail, because it is strings and numbers
	err := m.Respond(data)
	if st, ok := answer.(micro.Stats); ok && errors.Is(err, nats.ErrMaxPayload) { // leave out what only aegis adds
		for _, e := range st.Endpoints {
			e.Data = nil
		}
		data, _ = json.Marshal(st)
		if err = m.Respond(data); errors.Is(err, nats.ErrMaxPayload) {
			st.Metadata = map[string]string{}
			data, _ = json.Marshal(st)
			err = m.Respond(data)
		}
	}
	if err != nil {
		s.log.Warn("the answer to a request for $SRV could not be sent", "subject", m.Subject, "error", err)
	}
}

// microStats returns the answer to $SRV.STATS. The statistics that only aegis has are in the Data of each endpoint.
func (s *Service) microStats(identity micro.ServiceIdentity) micro.Stats {
	st := micro.Stats{ServiceIdentity: identity, Type: micro.StatsResponseType, Started: s.since.UTC()}
	st.Endpoints = []*micro.EndpointStats{} // not null in JSON
	for _, r := range s.readings() {
		if r.Kind == kindCall {
			continue
		}
		e := &micro.EndpointStats{
			Name: microName(r.Name), Subject: r.subject, QueueGroup: s.name, NumRequests: int(r.Requests), NumErrors: int(r.Errors),
			LastError: deref(r.last), ProcessingTime: r.sum, AverageProcessingTime: r.sum / time.Duration(max(r.handled, 1)),
		}
		e.Data, _ = json.Marshal(r) // can't fail, because it is strings and numbers
		st.Endpoints = append(st.Endpoints, e)
	}
	return st
}

// microName returns a name without the characters . * and >, which endpoints of NATS services can't have: order.* becomes
// order-ANY.
var microName = strings.NewReplacer(".", "-", "*", "ANY", ">", "ALL").Replace
