package aegis

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/micro"
)

// This file is what can be seen of a running service: its counters (Stats), the same over HTTP for Prometheus beside the probes of
// its health (Handler), and who calls whom (Dependencies, Mermaid).

// Stats is what an instance has counted since [New], and its state, at one moment.
type Stats struct {
	Service, Instance, Version string
	Uptime                     time.Duration     // since New
	Connected, Reconnects      int               // connections of the pool that stand; how often one was lost and made again
	Endpoints                  []EndpointStats   // by Kind, then Name
	Breakers                   map[string]string // service called -> "closed", "open" or "half-open"; see [WithBreaker]
	Leading                    map[string]uint64 // group -> term
}

// EndpointStats are those of a handler, or of the calls of a method of another service.
type EndpointStats struct {
	Kind string `json:"kind"` // "rpc", "event" or "command": a handler here; "call": calls from here
	Name string `json:"name"` // for a call, <service>.<method>

	Requests uint64            `json:"requests"`        // all that came to an end, whether a handler ran or not; of an event or a command, each attempt
	Errors   uint64            `json:"errors"`          // those that did not succeed
	Codes    map[string]uint64 `json:"codes,omitempty"` // of Errors; beyond 64 codes, the rest is OTHERS

	InFlight    int64  `json:"in_flight"`    // handlers that run, or calls that wait for their answer
	Pending     int64  `json:"pending"`      // what waits for a handler: here, and in the stream but for what was tried before
	Shed        uint64 `json:"shed"`         // requests refused as OVERLOADED
	Expired     uint64 `json:"expired"`      // requests that were not run since their caller had given up, and got no answer
	DeadLetters uint64 `json:"dead_letters"` // events and commands that were set aside

	// How long handlers ran, of a call until it ended. P50, P90 and P99 are estimates from buckets that are at most 25 % wide, or 1 µs.
	P50 time.Duration `json:"p50_ns"`
	P90 time.Duration `json:"p90_ns"`
	P99 time.Duration `json:"p99_ns"`
	Max time.Duration `json:"max_ns"`

	Callers map[string]uint64 `json:"callers,omitempty"` // calling or publishing service, if it is known -> requests; beyond 256, the rest is OTHERS
}

// Stats are the service's figures at this moment. How many events and commands wait, it asks the server, once a second at most and
// for 0.25 s; what it doesn't learn is as it was before.
func (s *Service) Stats() Stats {
	st := s.overview()
	for _, r := range s.readings() {
		st.Endpoints = append(st.Endpoints, r.EndpointStats)
	}
	return st
}

// overview is Stats without its endpoints.
func (s *Service) overview() Stats {
	st := Stats{
		Service: s.name, Instance: s.id, Version: s.cfg.version,
		Uptime:   time.Since(s.since),
		Breakers: map[string]string{},
		Leading:  map[string]uint64{},
	}
	for _, c := range s.conns {
		if c.up.Load() {
			st.Connected++
		}
		st.Reconnects += int(c.reconnects.Load())
	}
	for service, b := range s.breakers.all() {
		st.Breakers[service] = b.state()
	}
	for group, term := range s.groups() {
		if term != 0 {
			st.Leading[group] = term
		}
	}
	return st
}

// A meter counts what becomes of an endpoint's messages, or of the calls of a method. It takes no lock but when it meets a code or
// a caller for the first time.
type meter struct {
	buckets             [bucketCount]atomic.Uint64 // how long those took that were handled
	sum, longest        atomic.Int64               // ns
	succeeded           atomic.Uint64
	codes               lookup[*atomic.Uint64] // of the rest
	shed, expired, dead atomic.Uint64
	inFlight            atomic.Int64
	callers             lookup[*caller]
	last                atomic.Pointer[string] // error
}

type caller struct{ requests, errors atomic.Uint64 }

func newMeter() *meter {
	m := &meter{}
	m.codes.most, m.callers.most = 64, 256 // they come from elsewhere
	return m
}

// begin is when a handler or a call began; handled has to follow.
func (m *meter) begin() time.Duration {
	m.inFlight.Add(1)
	return clock()
}

// handled counts what has ended.
func (m *meter) handled(from string, begin time.Duration, failure *Error) {
	took := clock() - begin
	m.inFlight.Add(-1)
	for longest := m.longest.Load(); int64(took) > longest && !m.longest.CompareAndSwap(longest, int64(took)); {
		longest = m.longest.Load()
	}
	m.sum.Add(int64(took))
	bucket, _ := slices.BinarySearch(bucketBounds, took) // of the smallest bound that is no less
	m.buckets[bucket].Add(1)
	m.ended(from, failure)
}

// ended counts how it ended, also what no handler saw.
func (m *meter) ended(from string, failure *Error) {
	if failure == nil {
		m.succeeded.Add(1)
	} else {
		code := cmp.Or(failure.Code, ErrInternal.Code) // it may be another service's: anything
		code = strings.ToValidUTF8(code[:min(len(code), 64)], "?")
		m.codes.get(code, func() *atomic.Uint64 { return &atomic.Uint64{} }).Add(1)
		text := failure.Error()
		text = strings.Clone(text[:min(len(text), maxErrorText)])
		m.last.Store(&text)
	}
	if from == "" {
		return
	}
	c := m.callers.get(from, func() *caller { return &caller{} })
	c.requests.Add(1)
	if failure != nil {
		c.errors.Add(1)
	}
}

// The buckets are 14 a decade, from 1 µs to 900 s, and one for what is beyond. Prometheus is told 1, 2.5 and 5 of each decade.
const bucketCount = 9*14 + 1

var bucketBounds = func() (bounds []time.Duration) {
	for decade := time.Microsecond; decade <= 100*time.Second; decade *= 10 {
		for _, tenths := range []time.Duration{10, 12, 15, 18, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90} {
			bounds = append(bounds, decade*tenths/10)
		}
	}
	return bounds
}()

// A reading is what a meter shows.
type reading struct {
	EndpointStats
	Failed map[string]uint64 `json:"caller_errors,omitempty"` // by caller

	subject   string
	succeeded uint64
	last      *string // error
	sum       time.Duration
	handled   uint64
	buckets   [bucketCount]uint64
}

func (m *meter) read(kind, name string) *reading {
	r := &reading{EndpointStats: EndpointStats{
		Kind: kind, Name: name,
		Codes: map[string]uint64{}, Callers: map[string]uint64{},
		InFlight:    m.inFlight.Load(),
		Shed:        m.shed.Load(),
		Expired:     m.expired.Load(),
		DeadLetters: m.dead.Load(),
	}, Failed: map[string]uint64{}, succeeded: m.succeeded.Load(), last: m.last.Load()}
	for code, n := range m.codes.all() {
		r.Codes[code] = n.Load()
		r.Errors += n.Load()
	}
	for name, c := range m.callers.all() {
		if n := c.errors.Load(); n > 0 {
			r.Failed[name] = n
		}
		r.Callers[name] = c.requests.Load()
	}
	for i := range m.buckets {
		r.buckets[i] = m.buckets[i].Load()
		r.handled += r.buckets[i]
	}
	r.sum, r.Max = time.Duration(m.sum.Load()), time.Duration(m.longest.Load())
	r.Requests = r.succeeded + r.Errors
	r.P50, r.P90, r.P99 = r.quantile(0.5), r.quantile(0.9), r.quantile(0.99)
	return r
}

// quantile takes the values of a bucket to be spread evenly.
func (r *reading) quantile(q float64) time.Duration {
	rank := q * float64(r.handled)
	for i, n := range r.buckets {
		if n == 0 || rank > float64(n) {
			rank -= float64(n)
			continue
		}
		low, high := time.Duration(0), r.Max
		if i > 0 {
			low = bucketBounds[i-1]
		}
		if i < len(bucketBounds) {
			high = max(min(bucketBounds[i], r.Max), low)
		}
		return low + time.Duration(float64(high-low)*rank/float64(n))
	}
	return r.Max
}

// readings are those of all handlers and of the calls, by kind and name.
func (s *Service) readings() []*reading {
	handlers := s.handlers()
	out := make([]*reading, len(handlers))
	var all sync.WaitGroup
	for i, e := range handlers {
		all.Go(func() {
			out[i] = e.meter.read(e.kind, e.name)
			out[i].subject = e.subject
			out[i].Pending = int64(len(e.queue)+len(e.waiting)) + e.source.pending()
		})
	}
	all.Wait()
	for name, m := range s.calls.all() {
		out = append(out, m.read(kindCall, name))
	}
	slices.SortFunc(out, func(a, b *reading) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name)) })
	return out
}

// groups are those whose leadership this instance campaigns for, with its term, 0 while it doesn't lead.
func (s *Service) groups() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	groups := map[string]uint64{}
	for c := range s.candidates {
		if t := c.term.Load(); t.holds() {
			groups[c.group] = t.number
		} else {
			groups[c.group] += 0
		}
	}
	return groups
}

// Handler serves /metrics, for Prometheus, in its text format; /healthz, which is 200 until the service is stopped, then 503; and
// /readyz, which is 503 also while there is no connection, a health check fails, or the service doesn't serve its handlers, since
// Start isn't through or Stop has begun. The two answer a JSON object, in which "status" is "ok" or "unavailable", and "checks" has
// each check by its name: "ok" or its error.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(s.exposition()) // if that fails, nobody listens any more
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		checks := map[string]*Error{"service": nil}
		if isClosed(s.done) {
			checks["service"] = s.closedError()
		}
		writeHealth(w, checks)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		checks := map[string]*Error{"service": nil, "connection": nil}
		for _, h := range s.cfg.healthChecks {
			checks[h.name] = h.failure.Load()
		}
		if s.pick() == nil {
			checks["connection"] = s.disconnectedError()
		}
		if s.quitting.Err() != nil {
			checks["service"] = newError(ErrClosed, "service %s is stopping, or was stopped", s.name)
		} else if !s.ready.Load() && len(s.handlers()) > 0 {
			checks["service"] = newError(ErrUnavailable, "service %s has not been started", s.name)
		}
		writeHealth(w, checks)
	})
	return mux
}

func writeHealth(w http.ResponseWriter, checks map[string]*Error) {
	const ok = "ok"
	body := struct {
		Status string            `json:"status"`
		Checks map[string]string `json:"checks"`
	}{ok, map[string]string{}}
	status := http.StatusOK
	for name, failure := range checks {
		body.Checks[name] = ok
		if failure != nil {
			body.Checks[name] = failure.Error()
			body.Status, status = "unavailable", http.StatusServiceUnavailable
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // if that fails, nobody listens any more
}

// exposition is all metrics in the text format of Prometheus:
// https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
func (s *Service) exposition() []byte {
	var out bytes.Buffer
	family := func(name, kind, help string) {
		fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	sample := func(name string, value float64, labels ...string) { // label, value, label, value
		out.WriteString(name + `{service="` + s.name + `"`)
		for i := 0; i < len(labels); i += 2 {
			out.WriteString("," + labels[i] + `="` + escape.Replace(labels[i+1]) + `"`)
		}
		out.WriteString("} " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
	}
	readings := s.readings()
	each := func(name, kind, help string, value func(*reading) float64) {
		family(name, kind, help)
		for _, r := range readings {
			sample(name, value(r), "kind", r.Kind, "endpoint", r.Name)
		}
	}
	family("aegis_requests_total", "counter", "Requests, events, commands and calls that came to an end, by error code, which is empty for success.")
	for _, r := range readings {
		sample("aegis_requests_total", float64(r.succeeded), "kind", r.Kind, "endpoint", r.Name, "code", "")
		for _, code := range slices.Sorted(maps.Keys(r.Codes)) {
			sample("aegis_requests_total", float64(r.Codes[code]), "kind", r.Kind, "endpoint", r.Name, "code", code)
		}
	}
	family("aegis_request_duration_seconds", "histogram", "How long handlers ran, and calls took.")
	for _, r := range readings {
		const name = "aegis_request_duration_seconds"
		labels := []string{"kind", r.Kind, "endpoint", r.Name}
		sum := uint64(0)
		for i, bound := range bucketBounds {
			sum += r.buckets[i]
			if place := i % 14; place == 0 || place == 5 || place == 9 {
				le := strconv.FormatFloat(bound.Seconds(), 'g', -1, 64)
				sample(name+"_bucket", float64(sum), append(labels, "le", le)...)
			}
		}
		sample(name+"_bucket", float64(r.handled), append(labels, "le", "+Inf")...)
		sample(name+"_sum", r.sum.Seconds(), labels...)
		sample(name+"_count", float64(r.handled), labels...)
	}
	each("aegis_in_flight", "gauge", "Handlers that run, and calls that wait for their answer.", func(r *reading) float64 { return float64(r.InFlight) })
	each("aegis_pending", "gauge", "What waits for a handler, in the instance and in the stream.", func(r *reading) float64 { return float64(r.Pending) })
	each("aegis_shed_total", "counter", "Requests that were refused as OVERLOADED.", func(r *reading) float64 { return float64(r.Shed) })
	each("aegis_expired_total", "counter", "Requests that were not run since their caller had given up.", func(r *reading) float64 { return float64(r.Expired) })
	each("aegis_dead_letters_total", "counter", "Events and commands that were set aside.", func(r *reading) float64 { return float64(r.DeadLetters) })
	st := s.overview()
	family("aegis_connections", "gauge", "Connections of the pool that stand.")
	sample("aegis_connections", float64(st.Connected))
	family("aegis_reconnects_total", "counter", "Connections that were lost and made again.")
	sample("aegis_reconnects_total", float64(st.Reconnects))
	family("aegis_breaker_open", "gauge", "1 while calls to the service are refused by the circuit breaker.")
	for _, service := range slices.Sorted(maps.Keys(st.Breakers)) {
		sample("aegis_breaker_open", oneIf(st.Breakers[service] == open), "target", service)
	}
	family("aegis_leader", "gauge", "1 while this instance leads the group.")
	groups := s.groups()
	for _, group := range slices.Sorted(maps.Keys(groups)) {
		sample("aegis_leader", oneIf(groups[group] != 0), "group", group)
	}
	family("aegis_uptime_seconds", "gauge", "Time since the service was made.")
	sample("aegis_uptime_seconds", st.Uptime.Seconds())
	return out.Bytes()
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// A Dependency says how often one service has called an endpoint of another, or published what it handles.
type Dependency struct {
	From, To, Endpoint string // two services, and the name of a handler
	Requests, Errors   uint64
}

const (
	surveySilence = 500 * time.Millisecond // that ends a survey
	surveyRoom    = 1 << 16                // answers that may wait to be read
)

// Dependencies asks all instances that run now who has called them since they were made, and adds it up: by To, From, and
// Endpoint. An attempt at an event or a command counts as a call. It returns when no further instance has answered for 0.5 s.
// Callers that aren't services of aegis have no name, and don't show.
//
// Errors: [ErrUnavailable] without a connection, or if it drops; [ErrTimeout], [ErrCanceled] if ctx ends before, or [WithTimeout] if it has no
// deadline; [ErrClosed].
func (s *Service) Dependencies(ctx context.Context) ([]Dependency, error) {
	c := s.pick()
	if c == nil {
		return nil, s.disconnectedError()
	}
	ctx, cancel := withDeadline(ctx, s.cfg.timeout)
	defer cancel()
	sl, failure := c.newSlot(c.newInbox(), surveyRoom)
	if failure != nil {
		return nil, failure
	}
	defer c.endSlot(sl)
	const survey = "$SRV.STATS"
	sl.drops, sl.since = c.drops.Load(), clock()
	if err := c.nc.PublishRequest(survey, sl.prefix, nil); err != nil {
		return nil, newError(ErrUnavailable, "asking all services: %v", err)
	}
	sums := map[Dependency]Dependency{} // without the counts -> with them
	for silent := false; !silent; {
		sl.wakeAt(clock() + surveySilence)
		select {
		case m := <-sl.answers:
			if m != nil {
				addCalls(sums, m.Data)
			} else if failure := s.answerLost(c, sl, survey); failure != nil {
				if silent = failure.Code == ErrTimeout.Code; !silent {
					return nil, newError(failure, "asking all services: %s", failure.Message)
				}
			}
		case <-ctx.Done():
			return nil, asError(ctx.Err())
		}
	}
	deps := slices.Collect(maps.Values(sums))
	slices.SortFunc(deps, func(a, b Dependency) int {
		return cmp.Or(cmp.Compare(a.To, b.To), cmp.Compare(a.From, b.From), cmp.Compare(a.Endpoint, b.Endpoint))
	})
	return deps, nil
}

// addCalls adds what an instance answers to $SRV.STATS, if it is of aegis.
func addCalls(sums map[Dependency]Dependency, answer []byte) {
	var st micro.Stats
	if json.Unmarshal(answer, &st) != nil {
		return
	}
	for _, e := range st.Endpoints {
		var r reading
		if e == nil || json.Unmarshal(e.Data, &r) != nil {
			continue
		}
		for from, n := range r.Callers {
			key := Dependency{From: from, To: st.Name, Endpoint: r.Name}
			sum := sums[key]
			key.Requests, key.Errors = sum.Requests+n, sum.Errors+r.Failed[from]
			sums[Dependency{From: from, To: st.Name, Endpoint: r.Name}] = key
		}
	}
}

// Mermaid draws dependencies as a flowchart (https://mermaid.js.org/syntax/flowchart.html), for a README or a wiki: an arrow from
// each caller to each service that it calls, labelled with the endpoints, the requests, and how many of them failed.
func Mermaid(deps []Dependency) string {
	text := func(s string) string { // Mermaid has entities that begin with #
		var b strings.Builder
		for _, r := range s {
			if strings.ContainsRune("\"<>#&;`|", r) || r < ' ' {
				fmt.Fprintf(&b, "#%d;", r)
			} else {
				b.WriteRune(r)
			}
		}
		return b.String()
	}
	type arrow struct{ from, to string }
	var names []string
	var arrows []arrow
	labels := map[arrow][]string{}
	for _, d := range deps {
		names = append(names, d.From, d.To)
		a := arrow{d.From, d.To}
		if labels[a] == nil {
			arrows = append(arrows, a)
		}
		label := fmt.Sprintf("%s: %d", text(d.Endpoint), d.Requests)
		if d.Errors > 0 {
			label += fmt.Sprintf(", %d failed", d.Errors)
		}
		labels[a] = append(labels[a], label)
	}
	slices.Sort(names)
	names = slices.Compact(names)
	var b strings.Builder
	b.WriteString("flowchart LR\n")
	node := map[string]string{} // a service may have a name that is a word of Mermaid's
	for i, name := range names {
		node[name] = "s" + strconv.Itoa(i)
		fmt.Fprintf(&b, "    %s[\"%s\"]\n", node[name], text(name))
	}
	for _, a := range arrows {
		fmt.Fprintf(&b, "    %s -->|\"%s\"| %s\n", node[a.from], strings.Join(labels[a], "<br>"), node[a.to])
	}
	return b.String()
}
