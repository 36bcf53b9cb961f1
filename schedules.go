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

// This file has delayed and expiring events: At, After and ExpireAfter of Publish, and RetryAfter of a handler. A delayed event
// is a schedule: a message that the server keeps on a subject of its own, and stores again for the event's subject when it is
// due:
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
		return notRun(newError(ErrInvalid, lacks+"it drops messages after %v (max_age), before %v",
			have.MaxAge, p.due.Format(time.RFC3339)))
	}
	p.checked = true
	return nil
}

// storeForLater stores an event again, to be delivered to this subscription after a pause, and acknowledges the present
// delivery. The later delivery counts as the same attempt. If the event would expire before that, it is only acknowledged.
// storeForLater reports false, and acknowledges nothing, if the stream can't keep the event for that long or does not confirm
// it.
func (f *eventSource) storeForLater(r *request, pause time.Duration) bool {
	d, h, ttl := r.delivery, copyHeader(r.in.Header), ""
	if r.in.Header.Get(jetstream.MsgTTLHeader) == "never" {
		ttl = "never"
	} else if lifetime := parseTTL(r.in.Header.Get(jetstream.MsgTTLHeader)); lifetime > 0 {
		left := time.Until(d.stored.Add(lifetime)) - pause
		if left < time.Second { // it expires before
			f.acknowledge(r.in, ack)
			return true
		}
		ttl = seconds(left)
	}
	if int64(pause) >= f.maxDelay.Load() {
		return false
	}
	// If the acknowledgement is lost, the event is redelivered, and storing it again replaces the schedule on the same subject.
	name := strconv.FormatUint(d.sequence, 10)
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
