package aegis

import (
	"bytes"
	"cmp"
	"context"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// This file has delayed and recurring commands: At and After of SendCommand, and ScheduleCommand. The server keeps the time, and
// stores the message of a command in the work queue when it is due; see schedules.go.

const (
	commandSchedulePrefix = "aegis.schedules.commands." // followed by <service>.<command>.<name of a schedule, or = and a hash>
	firingTTL             = 24 * time.Hour              // after which a firing that no worker has begun is dropped
)

// scheduleOf returns the subject of the schedule of one command, which has this key.
func scheduleOf(key string) string {
	service, rest, _ := strings.Cut(key, ".")
	command, _, _ := strings.Cut(rest, ".")
	return commandSchedulePrefix + service + "." + command + ".=" + strings.TrimPrefix(scheduleSubject(key), eventSchedulePrefix)
}

// checkCommandSchedule returns an error if the stream can't keep a schedule with this subject until the time due. A zero due
// asks only whether it can keep schedules. checkCommandSchedule makes the stream if there is none.
func (s *Service) checkCommandSchedule(ctx context.Context, subject string, due time.Time) *Error {
	stream, failure := s.openStream(ctx, s.commandStream(), subject)
	if failure != nil {
		return notRun(failure)
	}
	const lacks = "the stream " + commandStream + ", which exists, can't do what is wanted: "
	switch have := stream.CachedInfo().Config; {
	case !have.AllowMsgSchedules:
		return notRun(newError(ErrInvalid, lacks+"for commands at a time set allow_msg_schedules"))
	case have.MaxAge > 0 && time.Until(due) > have.MaxAge:
		return notRun(newError(ErrInvalid, lacks+"it drops messages after %v (max_age), before %v",
			have.MaxAge, due.Format(time.RFC3339)))
	}
	return nil
}

// A Schedule describes a command that is sent repeatedly, in the list of [Service.Schedules].
type Schedule struct {
	Name, Spec       string    // the parameters of ScheduleCommand
	Service, Command string    // the service that handles the command, and its name
	Set              time.Time // when the schedule was set last, by the server's clock
}

// ScheduleCommand sets a schedule by which the server sends a command repeatedly. The server keeps the schedule and sends the
// commands, so that this process need not run. Each firing is a new command, which one instance of the service executes. Its id
// is <name>@<time>, with the time of the firing that follows it, by which duplicates of one firing are recognized.
//
// name is 1 to 64 letters, digits, - and _. ScheduleCommand replaces a schedule of the same name, service and command. If nothing
// changes, it leaves the schedule as it is, so that all instances may set it when they start.
//
// spec is one of these:
//   - @every and an interval of at least 1 s, which counts from when the schedule is set, as in "@every 1m30s"
//   - @hourly, @daily, @midnight, @weekly, @monthly, @yearly or @annually
//   - six fields for second, minute, hour, day of month, month, and day of week (0 to 6 or SUN to SAT), as in "0 30 9 * *
//     MON-FRI"
//
// The time zone is UTC, unless spec begins with another one, as in "TZ=Europe/London 0 0 9 * * *". @every has no time zone.
//
// While the server is down, no schedule fires. After a clean restart of the server, one missed firing takes place late. After a
// crash of the server, the interval of @every begins again. A firing that no instance has begun within a day, or within
// [ExpireAfter], is dropped. In rare cases, when the stream gets another leader, a firing takes place twice. The options are
// [AtPriority] and ExpireAfter; others are invalid. ScheduleCommand blocks until ctx ends at most, or for several times
// [WithTimeout] if ctx has no deadline.
//
// Errors:
//   - [ErrInvalid] if spec, a name, an option or a header is invalid, if data can't be encoded or is too large, or if the stream
//     AEGIS_COMMANDS exists but does not support schedules
//   - those of [Publish]
func ScheduleCommand[T any](ctx context.Context, s *Service, name, spec, service, command string, data T, opts ...CallOption) error {
	cfg, failure := newCallConfig(kindCommand, opts)
	if failure := cmp.Or(checkNames(service, kindCommand, command), failure); failure != nil {
		return failure
	}
	return s.scheduleCommand(ctx, name, spec, service, command, &data, cfg).orNil()
}

func (s *Service) scheduleCommand(ctx context.Context, name, spec, service, command string, value any, cfg *callConfig) *Error {
	pattern, zone, failure := parseSpec(spec)
	var ok checks
	ok.want(isToken(name, 64), "schedule %q: want a name of 1 to 64 of a-z, A-Z, 0-9, - and _", name)
	ok.want(cfg.at == nil && cfg.after == nil && cfg.key == nil && cfg.retry == nil && !cfg.sticky,
		"ScheduleCommand: the options are AtPriority and ExpireAfter")
	if failure := cmp.Or(failure, ok.failure); failure != nil {
		return failure
	}
	what, target := "the command "+service+"."+command, commandPrefix+service+"."+command+prioritySuffixes[*cfg.priority]
	out, failure := s.marshal(value, what)
	if failure != nil {
		return failure
	}
	return s.through(ctx, kindSend, target, out, func(ctx context.Context, data []byte) *Error {
		h := s.newHeader(ctx)
		h[headerSchedule], h[headerSpec] = []string{name}, []string{spec}
		if failure := s.seal(h, Raw{data, out.codec}, what); failure != nil {
			return failure
		}
		h[jetstream.ScheduleHeader], h[jetstream.ScheduleTargetHeader] = []string{pattern}, []string{target}
		h[jetstream.ScheduleTTLHeader] = []string{seconds(cmp.Or(cfg.expire, firingTTL))}
		if zone != "" {
			h[jetstream.ScheduleTimeZoneHeader] = []string{zone}
		}
		x := &exchange{subject: commandSchedulePrefix + service + "." + command + "." + name, header: h, data: data}
		if failure := s.checkCommandSchedule(ctx, x.subject, time.Time{}); failure != nil {
			return failure
		}
		now, failure := s.readSchedule(ctx, x.subject)
		if failure == nil && sameSchedule(now, x) {
			return nil
		}
		if failure != nil && failure.Code != ErrNotFound.Code {
			return notRun(failure)
		}
		return s.storeWithRetries(ctx, x, s.commandStream(), cfg)
	})
}

// sameSchedule reports whether x would change nothing about the schedule in m.
func sameSchedule(m *jetstream.RawStreamMsg, x *exchange) bool {
	same := func(key string) bool { return slices.Equal(m.Header[key], x.header[key]) }
	return bytes.Equal(m.Data, x.data) && !slices.ContainsFunc([]string{
		headerSpec, headerContentType, headerSource, jetstream.ScheduleTargetHeader, jetstream.ScheduleTTLHeader,
	}, func(key string) bool { return !same(key) })
}

// parseSpec returns the pattern and the time zone for the server. The server checks the rest.
func parseSpec(spec string) (pattern, zone string, failure *Error) {
	pattern = strings.TrimSpace(spec)
	if rest, ok := strings.CutPrefix(pattern, "TZ="); ok {
		zone, pattern, _ = strings.Cut(rest, " ")
		pattern = strings.TrimSpace(pattern)
	}
	every, isEvery := strings.CutPrefix(pattern, "@every ")
	interval, err := time.ParseDuration(every)
	macros := []string{"@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually"}
	switch {
	case isEvery && zone != "":
		return "", "", notRun(newError(ErrInvalid, "schedule %q: an interval has no time zone", spec))
	case isEvery && (err != nil || interval < time.Second):
		return "", "", notRun(newError(ErrInvalid, "schedule %q: want an interval of 1s or more", spec))
	case isEvery, slices.Contains(macros, pattern), pattern != "" && pattern[0] != '@' && len(strings.Fields(pattern)) == 6:
		return pattern, zone, nil
	}
	return "", "", notRun(newError(ErrInvalid, "schedule %q: want @every and an interval, @hourly, @daily, @weekly, @monthly, @yearly, "+
		"or six fields that begin with the seconds", spec))
}

// readSchedule returns the message that is stored under a schedule's subject.
func (s *Service) readSchedule(ctx context.Context, subject string) (m *jetstream.RawStreamMsg, failure *Error) {
	what := "the schedule " + subject
	failure = s.askStream(ctx, commandStream, what, func(ctx context.Context, stream jetstream.Stream) (err error) {
		m, err = stream.GetLastMsgForSubject(ctx, subject)
		return err
	})
	return m, failure
}

// Schedules yields the schedules of all services that [ScheduleCommand] has set. It reads them one by one. Each read blocks until
// ctx ends at most, or for [WithTimeout] if ctx has no deadline. If a read fails, Schedules yields the error and ends.
//
// Errors:
//   - those of [Service.DeadLetters]
func (s *Service) Schedules(ctx context.Context) iter.Seq2[Schedule, error] {
	return stored(ctx, s, commandStream, commandSchedulePrefix+">", func(m *jetstream.RawStreamMsg) (Schedule, bool) {
		tokens := strings.Split(strings.TrimPrefix(m.Subject, commandSchedulePrefix), ".")
		name := m.Header.Get(headerSchedule)
		if name == "" || len(tokens) != 3 { // a command for later
			return Schedule{}, false
		}
		return Schedule{name, m.Header.Get(headerSpec), tokens[0], tokens[1], m.Time}, true
	})
}

// Unschedule removes a schedule that [ScheduleCommand] has set. Commands that the schedule has sent already are not affected.
// Unschedule blocks until ctx ends at most, or for [WithTimeout] if ctx has no deadline.
//
// Errors:
//   - [ErrNotFound] if there is no such schedule
//   - [ErrInvalid] if a name is invalid
//   - those of [Service.DeadLetters]
func (s *Service) Unschedule(ctx context.Context, service, command, name string) error {
	if failure := checkNames(service, kindCommand, command); failure != nil {
		return failure
	}
	if !isToken(name, 64) {
		return notRun(newError(ErrInvalid, "schedule %q: want a name of 1 to 64 of a-z, A-Z, 0-9, - and _", name))
	}
	what := "the schedule " + name + " of " + service + "." + command
	return s.askStream(ctx, commandStream, what, func(ctx context.Context, stream jetstream.Stream) error {
		m, err := stream.GetLastMsgForSubject(ctx, commandSchedulePrefix+service+"."+command+"."+name)
		if err == nil {
			err = stream.DeleteMsg(ctx, m.Sequence)
		}
		return err
	}).orNil()
}

// firingID returns the id of a command that a schedule has sent, or "" if m is none. Duplicates of one firing have the same
// Nats-Schedule-Next, so they get the same id.
func firingID(m *nats.Msg, stored time.Time) string {
	name := m.Header.Get(headerSchedule)
	if !isToken(name, 64) {
		return ""
	}
	if next := m.Header.Get("Nats-Schedule-Next"); next != "" && len(next) < 64 && next != "purge" {
		return name + "@" + next
	}
	return name + "@" + stored.UTC().Format(time.RFC3339)
}
