package aegis

// This file is how services find out about each other: what a running instance tells about itself over the $SRV subjects of
// NATS services (ADR-32), and why nobody answers a call.

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"
)

// answerInfo answers $SRV.INFO.
func (s *Service) answerInfo(m *nats.Msg) {
	info := micro.Info{
		ServiceIdentity: micro.ServiceIdentity{Name: s.name, ID: s.id, Version: s.cfg.version, Metadata: map[string]string{}},
		Type:            micro.InfoResponseType,
		Endpoints:       []micro.EndpointInfo{},
	}
	s.mu.Lock()
	for _, e := range s.endpoints {
		if e.kind == kindEvent {
			continue
		}
		info.Endpoints = append(info.Endpoints, micro.EndpointInfo{Name: e.name, Subject: e.subject, QueueGroup: s.name, Metadata: map[string]string{}})
	}
	s.mu.Unlock()
	data, _ := json.Marshal(info) // strings only: it can't fail
	if err := m.Respond(data); err != nil {
		s.log.Warn("an answer was lost", "endpoint", m.Subject, "error", err)
	}
}

const whyTimeout = 500 * time.Millisecond

// whyNobody tells why the call that x stands for found no one who listens, by asking the service's instances for what they
// serve.
func (s *Service) whyNobody(ctx context.Context, x *exchange, service, instance string) *Error {
	ask, who := exchange{subject: "$SRV.INFO." + service, limit: min(x.limit, whyTimeout)}, service
	ask.until = clock() + ask.limit
	served := x.subject
	if instance != "" {
		ask.subject += "." + instance
		who = "instance " + instance + " of " + service
		served = served[:len(served)-len(instance)-1]
	}
	answer, failure := s.request(ctx, &ask)
	if failure != nil {
		return notRun(newError(ErrUnavailable, "nobody listens on %s: %s is not running", x.subject, who))
	}
	var info micro.Info
	if err := json.Unmarshal(answer.Data, &info); err != nil ||
		slices.ContainsFunc(info.Endpoints, func(e micro.EndpointInfo) bool { return e.Subject == served }) {
		return notRun(newError(ErrUnavailable, "nobody listens on %s: %s is starting or stopping", x.subject, who))
	}
	return notRun(newError(ErrUnimplemented, "%s (version %s) has no handler for %s", info.ID, info.Version, served))
}

// handles tells whether a running instance of the service has a handler for the subject; ok if none runs, so that it may come.
func (s *Service) handles(service, subject string) (ok bool) {
	known := service + " " + subject
	if _, ok := s.handled.Load(known); ok {
		return true
	}
	c := s.pick()
	if c == nil {
		return true // what comes next finds out
	}
	sl, failure := c.newSlot(c.newInbox()+".", 64)
	if failure != nil {
		return true
	}
	defer c.endSlot(sl)
	if c.nc.PublishRequest("$SRV.INFO."+service, sl.prefix+"info", nil) != nil {
		return true
	}
	answered := false
	for end := time.After(whyTimeout); ; {
		select {
		case m := <-sl.answers:
			if m == nil || isNobody(m) {
				return true
			}
			var info micro.Info
			if json.Unmarshal(m.Data, &info) != nil {
				continue
			}
			if slices.ContainsFunc(info.Endpoints, func(e micro.EndpointInfo) bool { return e.Subject == subject }) {
				s.handled.Store(known, true)
				return true
			}
			answered = true
		case <-end:
			return !answered
		}
	}
}
