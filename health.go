package aegis

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// This file has the health checks. They run from Start, or from the first Lead, with each heartbeat until Stop begins.

// A healthCheck is a check that was given to WithHealthCheck.
type healthCheck struct {
	name     string
	fn       func(context.Context) error
	running  atomic.Bool
	late     atomic.Bool           // whether the present run has taken too long, so that its result does not count
	known    atomic.Bool           // whether there was a result
	failure  atomic.Pointer[Error] // nil while the check succeeds
	contrary int                   // how many results in a row have differed from the present state; guarded by Service.healthMu
}

// status returns the error of the check, nil if it succeeds.
func (h *healthCheck) status() *Error {
	if !h.known.Load() {
		return newError(ErrUnavailable, "the check has not run yet")
	}
	return h.failure.Load()
}

// startHealth starts the health checks, unless it was called before. The channel that it returns is closed when all checks have
// had their first result.
func (s *Service) startHealth() <-chan struct{} {
	s.healthOnce.Do(func() {
		if len(s.cfg.healthChecks) == 0 || !s.startTask(s.runHealthChecks) {
			close(s.healthKnown)
		}
	})
	return s.healthKnown
}

func (s *Service) runHealthChecks() {
	tick := time.NewTicker(s.cfg.heartbeat)
	defer tick.Stop()
	announce := sync.OnceFunc(func() { close(s.healthKnown) })
	defer announce()
	first := s.checkHealth()
	for {
		select {
		case <-first:
		case <-tick.C:
			s.checkHealth() // a check that still runs has failed
		case <-s.quitting.Done():
			return
		}
		announce()
		first = nil
	}
}

// checkHealth starts all health checks. A check that is still running from an earlier time has failed, and is not started
// again. The channel that checkHealth returns is closed when all checks that it started have returned.
func (s *Service) checkHealth() <-chan struct{} {
	var all sync.WaitGroup
	for _, h := range s.cfg.healthChecks {
		if !h.running.CompareAndSwap(false, true) {
			h.late.Store(true)
			s.noteHealth(h, newError(ErrTimeout, "the check has not returned within %v", s.cfg.heartbeat))
			continue
		}
		h.late.Store(false) // a run may have ended just when it was found to be late
		all.Add(1)
		started := s.startTask(func() {
			defer all.Done()
			ctx, cancel := context.WithTimeout(s.base, s.cfg.heartbeat)
			defer cancel()
			failure := h.run(ctx)
			if failure == nil && ctx.Err() != nil {
				failure = newError(ErrTimeout, "the check has not returned within %v", s.cfg.heartbeat)
			}
			if !h.late.Swap(false) {
				s.noteHealth(h, failure)
			}
			h.running.Store(false)
		})
		if !started {
			all.Done()
		}
	}
	return closedAfter(all.Wait)
}

// run calls the check.
func (h *healthCheck) run(ctx context.Context) (failure *Error) {
	defer func() {
		if p := recover(); p != nil {
			failure = newError(ErrInternal, "panic: %v", p)
		}
	}()
	return asError(h.fn(ctx))
}

// noteHealth takes the result of a check. The first one counts at once. After that, the check's state changes when as many
// results in a row as WithHealthTolerance says differ from it. If the health of the instance has changed, noteHealth tells the
// candidates, the endpoints and the heartbeats.
func (s *Service) noteHealth(h *healthCheck, failure *Error) {
	s.healthMu.Lock()
	defer s.healthMu.Unlock()
	if h.known.Load() && (failure == nil) != (h.failure.Load() == nil) {
		if h.contrary++; h.contrary < s.cfg.tolerance {
			return
		}
	}
	h.contrary = 0
	h.failure.Store(failure)
	h.known.Store(true)
	unhealthy := false
	for _, h := range s.cfg.healthChecks {
		failure := h.failure.Load()
		unhealthy = unhealthy || failure != nil
		if failure != nil && !s.unhealthy.Load() {
			s.log.Warn("the instance is unhealthy: a health check fails", "check", h.name, "error", failure)
		}
	}
	if s.unhealthy.Swap(unhealthy) == unhealthy {
		return
	}
	if !unhealthy {
		s.log.Info("the instance is healthy again: all health checks succeed")
	}
	s.mu.Lock()
	for c := range s.candidates {
		signal(c.healthChanged)
	}
	s.mu.Unlock()
	s.statusChanged()
}
