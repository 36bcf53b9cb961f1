package aegis

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has what the server delivers later, and what it drops in time: At, After and ExpireAfter of events, and RetryAfter.
// The server stores a message that is a schedule, and stores it again for its target when it is due:
// https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-51.md

const eventSchedulePrefix = "aegis.schedules.events." // followed by a hash, so that each schedule has a subject of its own

// scheduleSubject returns the subject of the schedule of what these names identify.
func scheduleSubject(names ...string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", names))
	return eventSchedulePrefix + hex.EncodeToString(sum[:16])
}

// setSchedule makes h the header of a schedule: at the time due the server stores the message for target. It expires ttl after
// that, unless ttl is "".
func setSchedule(h nats.Header, due time.Time, target, ttl string) {
	h[jetstream.ScheduleHeader] = []string{"@at " + due.UTC().Format(time.RFC3339Nano)}
	h[jetstream.ScheduleTargetHeader] = []string{target}
	if ttl != "" {
		h[jetstream.ScheduleTTLHeader] = []string{ttl}
	}
}

// seconds returns a duration in the form of the server's headers, rounded up to whole seconds.
func seconds(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10) + "s"
}

// scheduleLimit returns for how long a stream of events can keep a message for later. It is 0 if it can't.
func scheduleLimit(stream jetstream.Stream) time.Duration {
	have := stream.CachedInfo().Config
	if !have.AllowMsgSchedules || !takes(stream, scheduleSubject()) {
		return 0
	}
	return cmp.Or(have.MaxAge, math.MaxInt64)
}

// target returns the subject to which an event is sent: that of its schedule if it is for later.
func (p *publication) target(suffix string) string {
	if p.due.IsZero() {
		return p.subject
	}
	return scheduleSubject(p.name, p.id+suffix)
}

// setTimes sets the headers of At, After and ExpireAfter.
func (p *publication) setTimes(suffix string) {
	ttl := ""
	if p.cfg.expire > 0 {
		ttl = seconds(p.cfg.expire)
	}
	if !p.due.IsZero() {
		p.header[headerID] = []string{p.id + suffix} // because the server drops the message id
		setSchedule(p.header, p.due, p.subject, ttl)
	} else if ttl != "" {
		p.header[jetstream.MsgTTLHeader] = []string{ttl}
	}
}

// checkStream returns an error if the stream can't do what the options want. It makes the stream if there is none.
func (p *publication) checkStream(ctx context.Context, x *exchange) *Error {
	if p.checked || p.due.IsZero() && p.cfg.expire == 0 {
		return nil
	}
	within, cancel := context.WithTimeout(ctx, x.until-clock())
	defer cancel()
	stream, failure := p.s.openStreamOnce(within, p.s.eventStream(), p.subject, x.subject)
	if failure != nil {
		return notRun(failure)
	}
	have, wait := stream.CachedInfo().Config, time.Until(p.due)
	const lacks = "the stream " + eventStream + ", which exists, can't do what the options want: "
	switch {
	case !p.due.IsZero() && !have.AllowMsgSchedules:
		return notRun(newError(ErrInvalid, lacks+"for At and After set allow_msg_schedules"))
	case p.cfg.expire > 0 && !have.AllowMsgTTL:
		return notRun(newError(ErrInvalid, lacks+"for ExpireAfter set allow_msg_ttl"))
	case have.MaxAge > 0 && wait > have.MaxAge:
		return notRun(newError(ErrInvalid, lacks+"it drops messages after %v (max_age), before %v", have.MaxAge, p.due.Format(time.RFC3339)))
	}
	p.checked = true
	return nil
}

// storeForLater has an event delivered to this subscription once more after a pause, as the same attempt: it stores the event anew, with a
// schedule, and acknowledges the delivery. It reports false if the stream can't do that.
func (f *eventSource) storeForLater(r *request, pause time.Duration) bool {
	d, h, ttl := r.delivery, copyHeader(r.in.Header), ""
	if t := r.in.Header.Get(jetstream.MsgTTLHeader); t != "" {
		left := time.Until(d.stored.Add(lifetime(t))) - pause
		if left < time.Second { // it expires before
			f.acknowledge(r.in, ack)
			return true
		}
		ttl = seconds(left)
	}
	if int64(pause) >= f.maxDelay.Load() {
		return false
	}
	name := strconv.FormatUint(d.sequence, 10) // if the acknowledgement is lost, the same again replaces what was stored
	h[headerSubject], h[headerID] = []string{r.msg.Subject}, []string{r.id}
	h[headerTime], h[headerAttempt] = []string{d.time.Format(time.RFC3339Nano)}, []string{strconv.Itoa(d.attempt)}
	h[jetstream.MsgIDHeader] = []string{"again-" + d.consumer + "-" + name}
	setSchedule(h, time.Now().Add(pause), redrivePrefix+d.consumer+".again-"+name, ttl)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // Stop does not cut it short
	defer cancel()
	x := &exchange{subject: scheduleSubject(d.consumer, name), header: h, data: r.in.Data}
	if failure := f.svc.storeWithRetries(ctx, x, f.svc.eventStream(), callConfigs[kindEvent]); failure != nil {
		f.logger(r).Warn("an event can't be stored for later, so that its next delivery counts as an attempt", "error", failure)
		return false
	}
	f.acknowledge(r.in, ack)
	f.noteFailure(d.sequence, nil)
	return true
}

// lifetime returns what a Nats-TTL header says: a duration, or a number of seconds. The server has checked it.
func lifetime(ttl string) time.Duration {
	if d, err := time.ParseDuration(ttl); err == nil {
		return d
	}
	if n, err := strconv.ParseInt(ttl, 10, 32); err == nil {
		return time.Duration(n) * time.Second
	}
	return maxBudget // "never"
}
