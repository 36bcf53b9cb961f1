package aegis

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/micro"
)

// This file has what can be observed of a running service: its counters (Stats), the same counters for Prometheus and the health
// probes, both over HTTP (Handler), and the map of who calls whom (Dependencies, Mermaid).

// Stats are the statistics of an instance since [New], and its state, at one moment.
type Stats struct {
	Service, Instance, Version string            // the service's name, the instance's id, and the service's version
	Uptime                     time.Duration     // the time since New
	Connected, Reconnects      int               // how many connections of the pool are up; how often one was lost and made again
	Endpoints                  []EndpointStats   // of all handlers, and of all methods that are called, sorted by Kind, then by Name
	Breakers                   map[string]string // the state of each circuit breaker, by service: "closed", "open", "half-open"
	Leading                    map[string]uint64 // the term by group, for each group that this instance leads
}

// EndpointStats are the statistics of a handler, or of the calls from this instance to a method of a service.
type EndpointStats struct {
	Kind string `json:"kind"` // "rpc", "event" or "command" for a handler; "call" for calls from this instance
	Name string `json:"name"` // of the method, the command or the subscription; for calls, <service>.<method>

	// Requests counts the requests, events, commands and calls that have ended, whether a handler ran or not. Each attempt at an
	// event or a command counts.
	Requests uint64            `json:"requests"`
	Errors   uint64            `json:"errors"`          // requests that did not succeed
	Codes    map[string]uint64 `json:"codes,omitempty"` // errors by code; beyond 64 codes, the rest is counted as OTHERS

	InFlight    int64  `json:"in_flight"`    // handlers that are running, or calls that are waiting for their answer
	Pending     int64  `json:"pending"`      // messages that wait for their first attempt, in the instance or in the stream
	Shed        uint64 `json:"shed"`         // requests that were rejected as OVERLOADED
	Expired     uint64 `json:"expired"`      // requests that were dropped without an answer because their caller had given up
	DeadLetters uint64 `json:"dead_letters"` // events and commands that became dead letters

	// P50, P90, P99 and Max are the percentiles and the maximum of how long handlers ran, or calls took. The percentiles are
	// estimates from buckets that are at most 25 % or 1 µs wide.
	P50 time.Duration `json:"p50_ns"`
	P90 time.Duration `json:"p90_ns"`
	P99 time.Duration `json:"p99_ns"`
	Max time.Duration `json:"max_ns"`

	// Callers counts Requests by the service that sent them, if the message names it. The sender claims the name; it is not
	// authenticated. Beyond 256 services, the rest is counted as OTHERS.
	Callers map[string]uint64 `json:"callers,omitempty"`
}

// Stats returns the statistics of the instance. It asks the server at most once a second how many events and commands wait, and
// blocks for at most 0.25 s. If the server does not answer, Stats returns the numbers that were known last.
func (s *Service) Stats() Stats { return s.stats(s.readings()) }

func (s *Service) stats(readings []*reading) Stats {
	st := Stats{Service: s.name, Instance: s.id, Version: s.cfg.version, Uptime: time.Since(s.since), Leading: s.terms()}
	st.Breakers = map[string]string{}
	maps.DeleteFunc(st.Leading, func(_ string, term uint64) bool { return term == 0 })
	for _, r := range readings {
		st.Endpoints = append(st.Endpoints, r.EndpointStats)
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
	return st
}

// terms returns the groups in which this instance is a candidate, each with the term that it leads, or 0 if it does not lead.
func (s *Service) terms() map[string]uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	terms := map[string]uint64{}
	for c := range s.candidates {
		number := uint64(0)
		if t := c.term.Load(); t.holds() {
			number = t.number
		}
		terms[c.group] = max(terms[c.group], number)
	}
	return terms
}

// A meter counts how an endpoint's messages, or the calls to a method, end. It takes a lock only when it meets an error code or a
// caller for the first time.
type meter struct {
	buckets             [bucketCount]atomic.Uint64 // requests by how long they took; see bucketBounds
	sum, longest        atomic.Int64               // of those durations, in ns
	succeeded           atomic.Uint64
	codes               lookup[*atomic.Uint64] // errors by code
	shed, expired, dead atomic.Uint64
	inFlight            atomic.Int64
	callers             lookup[*caller]
	lastError           atomic.Pointer[string] // the text of the latest error
}

type caller struct{ requests, errors atomic.Uint64 }

// newMeter returns a meter. It bounds the codes and the callers because their names come from outside.
func newMeter() *meter {
	return &meter{codes: lookup[*atomic.Uint64]{most: 64}, callers: lookup[*caller]{most: 256}}
}

// begin counts a handler or a call as in flight and returns the time. A call of finish has to follow.
func (m *meter) begin() time.Duration {
	m.inFlight.Add(1)
	return clock()
}

// finish counts the end of a handler or a call that begin has counted, and how long it took. begin is the time that the method
// begin returned. The request came from the service from, which is "" if the service is unknown.
func (m *meter) finish(from string, begin time.Duration, failure *Error) {
	took := clock() - begin
	m.inFlight.Add(-1)
	for longest := m.longest.Load(); int64(took) > longest && !m.longest.CompareAndSwap(longest, int64(took)); {
		longest = m.longest.Load()
	}
	m.sum.Add(int64(took))
	bucket, _ := slices.BinarySearch(bucketBounds, took) // the first whose bound is not below took
	m.buckets[bucket].Add(1)
	m.count(from, failure)
}

// count counts a request that has ended, and its failure if it has one, both in all and for the service that sent it, from.
// finish calls it; others call it only for a request that no handler ran.
func (m *meter) count(from string, failure *Error) {
	if failure == nil {
		m.succeeded.Add(1)
	} else {
		code := cmp.Or(failure.Code, ErrInternal.Code) // another service may have sent anything
		m.codes.get(cutText(code, 64), func() *atomic.Uint64 { return &atomic.Uint64{} }).Add(1)
		m.lastError.Store(new(strings.Clone(cutText(failure.Error(), maxErrorText))))
	}
	if from != "" {
		c := m.callers.get(from, func() *caller { return &caller{} })
		c.requests.Add(1)
		if failure != nil {
			c.errors.Add(1)
		}
	}
}

const bucketCount = 9*14 + 1

// bucketBounds has the upper bounds of the buckets: 14 for each decade from 1 µs to 900 s, and one bucket for what took longer.
// Prometheus gets 1, 2.5 and 5 of each decade.
var bucketBounds = func() (bounds []time.Duration) {
	for decade := time.Microsecond; decade <= 100*time.Second; decade *= 10 {
		for _, tenths := range []time.Duration{10, 12, 15, 18, 20, 25, 30, 35, 40, 50, 60, 70, 80, 90} {
			bounds = append(bounds, decade*tenths/10)
		}
	}
	return append(bounds, math.MaxInt64)
}()

// A reading is what a meter shows at one moment. Its exported fields are also the Data of an endpoint in $SRV.STATS.
type reading struct {
	EndpointStats
	Failed map[string]uint64 `json:"caller_errors,omitempty"` // errors by caller

	subject string
	last    *string // the text of the latest error
	sum     time.Duration
	handled uint64 // the sum of buckets
	buckets [bucketCount]uint64
}

// readings returns the statistics of all handlers and of the calls, by kind and name.
func (s *Service) readings() []*reading {
	handlers := s.allEndpoints()
	out := make([]*reading, len(handlers))
	var all sync.WaitGroup
	for i, e := range handlers {
		all.Go(func() { // because pending may have to wait for the server
			out[i] = e.meter.read(e.kind, e.name)
			out[i].subject = e.subject
			out[i].Pending = int64(len(e.queue)+e.waitingCount()) + e.source.pending()
		})
	}
	all.Wait()
	for name, m := range s.calls.all() {
		out = append(out, m.read(kindCall, name))
	}
	slices.SortFunc(out, func(a, b *reading) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name)) })
	return out
}

func (m *meter) read(kind, name string) *reading {
	r := &reading{EndpointStats: EndpointStats{
		Kind: kind, Name: name, Codes: map[string]uint64{}, Callers: map[string]uint64{},
		InFlight: m.inFlight.Load(), Shed: m.shed.Load(), Expired: m.expired.Load(), DeadLetters: m.dead.Load(),
	}, Failed: map[string]uint64{}, last: m.lastError.Load()}
	for code, n := range m.codes.all() {
		r.Codes[code] = n.Load()
		r.Errors += r.Codes[code]
	}
	r.Requests = m.succeeded.Load() + r.Errors
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
	r.P50, r.P90, r.P99 = r.quantile(0.5), r.quantile(0.9), r.quantile(0.99)
	return r
}

// quantile estimates a quantile of the durations. It assumes that the durations in a bucket are spread evenly.
func (r *reading) quantile(q float64) time.Duration {
	rank, low := q*float64(r.handled), time.Duration(0)
	for i, n := range r.buckets {
		if n > 0 && rank <= float64(n) {
			high := max(min(bucketBounds[i], r.Max), low)
			return low + time.Duration(float64(high-low)*rank/float64(n))
		}
		rank, low = rank-float64(n), bucketBounds[i]
	}
	return r.Max
}

// Handler returns an HTTP handler that serves three paths:
//
//   - /metrics has the metrics in the text format of Prometheus. It blocks for at most 0.25 s, as [Service.Stats] does.
//   - /healthz has the status 200 until Stop has finished or a connection was closed for good, and then 503.
//   - /readyz has the status 200 while the service is ready, and otherwise 503. The service is not ready while there is no
//     connection, while a health check fails or has not run yet, before Start has finished if there are handlers, and once Stop
//     has begun.
//
// /healthz and /readyz answer with a JSON object. Its "status" is "ok" or "unavailable". Its "checks" is an object that has, by
// the name of each check, "ok" or the text of the error.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.serveMetrics)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		checks := map[string]*Error{"service": nil}
		if isClosed(s.done) {
			checks["service"] = s.closedError()
		} else if s.broken.Err() != nil {
			checks["service"] = asError(context.Cause(s.broken))
		}
		writeHealth(w, checks)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		checks := map[string]*Error{"service": nil, "connection": nil}
		for _, h := range s.cfg.healthChecks {
			checks[h.name] = h.status()
		}
		if s.pick() == nil {
			checks["connection"] = s.disconnectedError()
		}
		if s.broken.Err() != nil {
			checks["connection"] = asError(context.Cause(s.broken))
		}
		if s.quitting.Err() != nil {
			checks["service"] = newError(ErrClosed, "service %s is stopping, or was stopped", s.name)
		} else if !s.ready.Load() && len(s.allEndpoints()) > 0 {
			checks["service"] = newError(ErrUnavailable, "service %s has not been started", s.name)
		}
		writeHealth(w, checks)
	})
	return mux
}

func writeHealth(w http.ResponseWriter, checks map[string]*Error) {
	body := struct {
		Status string            `json:"status"`
		Checks map[string]string `json:"checks"`
	}{"ok", map[string]string{}}
	status := http.StatusOK
	for name, failure := range checks {
		body.Checks[name] = "ok"
		if failure != nil {
			body.Checks[name] = failure.Error()
			body.Status, status = "unavailable", http.StatusServiceUnavailable
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // fails only if the client has gone
}

// serveMetrics writes all metrics in the text format of Prometheus:
// https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
func (s *Service) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	var families []*bytes.Buffer
	// family begins a metric, and returns the function that adds a sample to it. The labels are name, value, name, value.
	family := func(name, kind, help string) func(suffix string, value float64, labels ...string) {
		out := &bytes.Buffer{}
		families = append(families, out)
		fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
		return func(suffix string, value float64, labels ...string) {
			fmt.Fprintf(out, `%s%s{service="%s"`, name, suffix, s.name)
			for label := range slices.Chunk(labels, 2) {
				fmt.Fprintf(out, `,%s="%s"`, label[0], escape.Replace(label[1]))
			}
			fmt.Fprintf(out, "} %g\n", value)
		}
	}
	requests := family("aegis_requests_total", "counter",
		"Requests, events, commands and calls that came to an end, by error code, which is empty for success.")
	durations := family("aegis_request_duration_seconds", "histogram", "How long handlers ran, and calls took.")
	inFlight := family("aegis_in_flight", "gauge", "Handlers that run, and calls that wait for their answer.")
	pending := family("aegis_pending", "gauge", "Messages that wait for a handler, in the instance and in the stream.")
	shed := family("aegis_shed_total", "counter", "Requests that were rejected as OVERLOADED.")
	expired := family("aegis_expired_total", "counter", "Requests that were not run because their caller had given up.")
	dead := family("aegis_dead_letters_total", "counter", "Events and commands that became dead letters.")
	readings := s.readings()
	for _, r := range readings {
		endpoint := []string{"kind", r.Kind, "endpoint", r.Name}
		requests("", float64(r.Requests-r.Errors), append(endpoint, "code", "")...)
		for code := range statuses { // so that a rate sees the first failure
			r.Codes[code] += 0
		}
		for _, code := range slices.Sorted(maps.Keys(r.Codes)) {
			requests("", float64(r.Codes[code]), append(endpoint, "code", code)...)
		}
		count := uint64(0) // the buckets of Prometheus are cumulative
		for i, bound := range bucketBounds[:bucketCount-1] {
			count += r.buckets[i]
			if place := i % 14; place == 0 || place == 5 || place == 9 {
				durations("_bucket", float64(count), append(endpoint, "le", fmt.Sprint(bound.Seconds()))...)
			}
		}
		durations("_bucket", float64(r.handled), append(endpoint, "le", "+Inf")...)
		durations("_sum", r.sum.Seconds(), endpoint...)
		durations("_count", float64(r.handled), endpoint...)
		inFlight("", float64(r.InFlight), endpoint...)
		pending("", float64(r.Pending), endpoint...)
		shed("", float64(r.Shed), endpoint...)
		expired("", float64(r.Expired), endpoint...)
		dead("", float64(r.DeadLetters), endpoint...)
	}
	st, oneIf := s.stats(readings), map[bool]float64{true: 1}
	family("aegis_connections", "gauge", "Connections of the pool that are up.")("", float64(st.Connected))
	family("aegis_reconnects_total", "counter", "Connections that were lost and made again.")("", float64(st.Reconnects))
	breakers := family("aegis_breaker_open", "gauge", "1 while the circuit breaker refuses calls to the service.")
	for _, service := range slices.Sorted(maps.Keys(st.Breakers)) {
		breakers("", oneIf[st.Breakers[service] == breakerOpen], "target", service)
	}
	leader := family("aegis_leader", "gauge", "1 while this instance leads the group.")
	terms := s.terms()
	for _, group := range slices.Sorted(maps.Keys(terms)) {
		leader("", oneIf[terms[group] != 0], "group", group)
	}
	family("aegis_uptime_seconds", "gauge", "Time since the service was made.")("", st.Uptime.Seconds())
	for _, out := range families {
		_, _ = out.WriteTo(w) // fails only if the client has gone
	}
}

// A Dependency counts how often one service has called an endpoint of another service, or has sent an event or a command to it.
type Dependency struct {
	From, To, Endpoint string // the caller, the called service, and the name of its handler
	Requests, Errors   uint64 // how many requests there were, and how many of them failed
}

// Dependencies returns which services have called which others. It asks all running instances of all services for the calls
// that they have had since New, and returns the sums, sorted by To, From and Endpoint. Each attempt at an event or a command
// counts as a call. Dependencies blocks until no further answer has come for 0.5 s. The caller claims From; it is not
// authenticated. Callers that do not use aegis have no name and are left out.
//
// Errors:
//   - [ErrUnavailable] if there is no connection, or if it is lost
//   - [ErrOverloaded] if the connection carries too many calls ([WithPool]), or if the server's max_subscriptions is reached
//   - [ErrTimeout] or [ErrCanceled] if ctx ends first, or [ErrTimeout] after [WithTimeout] if ctx has no deadline
//   - [ErrDenied] if the server's permissions do not allow it
//   - [ErrClosed] after Stop
func (s *Service) Dependencies(ctx context.Context) ([]Dependency, error) {
	c := s.pick()
	if c == nil {
		return nil, s.disconnectedError()
	}
	ctx, cancel := withDeadline(ctx, s.cfg.timeout)
	defer cancel()
	sl, failure := c.newSlot(c.newInbox(), 1<<16) // large, because all instances answer at once
	if failure == errDropped {
		failure = s.disconnectedError()
	}
	if failure != nil {
		return nil, failure
	}
	defer c.endSlot(sl)
	const survey, silence = "$SRV.STATS", 500 * time.Millisecond
	if err := c.nc.PublishRequest(survey, sl.prefix, nil); err != nil {
		return nil, newError(ErrUnavailable, "asking all services: %v", err)
	}
	sums := map[Dependency]Dependency{} // by the Dependency without its counts
	for failure == nil {
		sl.wakeAt(clock() + silence)
		select {
		case m := <-sl.answers:
			if m != nil {
				addCalls(sums, m.Data)
			} else {
				failure = s.whyNoAnswer(c, sl, survey)
			}
		case <-ctx.Done():
			return nil, asError(ctx.Err())
		}
	}
	if failure.Code != ErrTimeout.Code { // a timeout here means silence: all answers have come
		return nil, newError(failure, "asking all services: %s", failure.Message)
	}
	return slices.SortedFunc(maps.Values(sums), func(a, b Dependency) int {
		return cmp.Or(cmp.Compare(a.To, b.To), cmp.Compare(a.From, b.From), cmp.Compare(a.Endpoint, b.Endpoint))
	}), nil
}

// addCalls adds to sums what an instance answered to $SRV.STATS. It ignores the answers of services that do not use aegis.
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
			sums[key] = Dependency{from, st.Name, r.Name, sum.Requests + n, sum.Errors + r.Failed[from]}
		}
	}
}

var mermaidSpecial = regexp.MustCompile("[\"<>#&;`|\x00-\x1f]") // the characters that Mermaid may take for syntax

// Mermaid returns a flowchart of deps in the language of Mermaid (https://mermaid.js.org/syntax/flowchart.html), for example
// for a README. The flowchart has an arrow from each caller to each service that it calls. Each arrow is labelled with the
// endpoints, the numbers of their requests, and how many of those failed.
func Mermaid(deps []Dependency) string {
	escape := func(s string) string { // Mermaid's entities begin with #. The conversion makes s valid UTF-8.
		return mermaidSpecial.ReplaceAllStringFunc(string([]rune(s)), func(c string) string { return fmt.Sprintf("#%d;", c[0]) })
	}
	type arrow struct{ from, to string }
	var arrows []arrow
	labels := map[arrow][]string{}
	nodes := map[string]string{} // by service, because the name of a service may be a keyword of Mermaid
	for _, d := range deps {
		nodes[d.From], nodes[d.To] = "", ""
		a := arrow{d.From, d.To}
		if labels[a] == nil {
			arrows = append(arrows, a)
		}
		label := fmt.Sprintf("%s: %d", escape(d.Endpoint), d.Requests)
		if d.Errors > 0 {
			label += fmt.Sprintf(", %d failed", d.Errors)
		}
		labels[a] = append(labels[a], label)
	}
	var b strings.Builder
	b.WriteString("flowchart LR\n")
	for i, name := range slices.Sorted(maps.Keys(nodes)) {
		nodes[name] = fmt.Sprintf("s%d", i)
		fmt.Fprintf(&b, "    %s[\"%s\"]\n", nodes[name], escape(name))
	}
	for _, a := range arrows {
		fmt.Fprintf(&b, "    %s -->|\"%s\"| %s\n", nodes[a.from], strings.Join(labels[a], "<br>"), nodes[a.to])
	}
	return b.String()
}
