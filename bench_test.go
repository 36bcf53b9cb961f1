package aegis_test

// Most benchmarks compare aegis with a baseline that does the same work in the same run, usually with nats.go alone, in
// alternating turns. The units that end in -raw are those of the baseline, and stand beside those of aegis; x-raw is the rate of
// aegis divided by that of the baseline. The client, the server and the service run in this process, so they share the machine's cores. For figures that
// are worth comparing, let the benchmarks run longer:
//
//	go test -run '^$' -bench . -benchtime 5s

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/vmihailenco/msgpack/v5"
)

// legend is printed before the benchmarks.
const legend = `req/s   calls, events or commands per second          p50, p99  latencies, half and 99 of 100 are shorter
allocs  allocations of one, on both sides and in the server
-raw    the same work with nats.go alone, in the same run  x-raw     our rate divided by that one
-bytes  nats.go with bytes that are encoded already        x-bytes   our rate divided by that one
`

type benchOrder struct {
	SKU string `json:"sku"`
	Qty int    `json:"qty"`
}

type benchReceipt struct {
	ID string `json:"id"`
}

// A benchTrade is the value that BenchmarkCall sends and receives.
type benchTrade struct {
	Account  string  `json:"account"`
	Symbol   string  `json:"symbol"`
	Quantity int64   `json:"quantity"`
	Price    float64 `json:"price"`
	Buy      bool    `json:"buy"`
}

// A rawTrade is a benchTrade with the tags that the baseline of BenchmarkCall needs for its codecs.
type rawTrade struct {
	Account  string  `json:"account" msgpack:"account"`
	Symbol   string  `json:"symbol" msgpack:"symbol"`
	Quantity int64   `json:"quantity" msgpack:"quantity"`
	Price    float64 `json:"price" msgpack:"price"`
	Buy      bool    `json:"buy" msgpack:"buy"`
}

// BenchmarkCall compares a call that carries a struct of five fields in each direction with two baselines: a Request of nats.go
// that carries the same struct, encoded and decoded on both sides as a user of nats.go would do it (-raw), and a Request that
// carries the encoded bytes as they are (-bytes). Both baselines answer in the callback of a queue subscription.
func BenchmarkCall(b *testing.B) {
	srv := startServer(b)
	type format struct {
		codec     aegis.Codec
		marshal   func(any) ([]byte, error)
		unmarshal func([]byte, any) error
	}
	for _, callers := range []int{1, 16, 256} {
		for _, f := range []format{{aegis.MsgPack, msgpack.Marshal, msgpack.Unmarshal}, {aegis.JSON, json.Marshal, json.Unmarshal}} {
			name := strings.TrimPrefix(f.codec.ContentType(), "application/")
			b.Run(fmt.Sprintf("callers=%d/%s", callers, name), func(b *testing.B) {
				service := "order-service-" + name
				svc := newService(b, srv, service, aegis.WithPool(1)) // one connection, like each baseline
				handle(b, svc, "create_order", func(_ context.Context, t benchTrade) (benchTrade, error) { return t, nil })
				start(b, svc)
				client := newService(b, srv, "client", aegis.WithPool(1), aegis.WithCodec(f.codec))
				trade := benchTrade{"ACC-1234", "AAPL", 100, 187.25, true}

				subject := "raw." + service + ".create_order"
				responder, requester := rawConn(b, srv.ClientURL()), rawConn(b, srv.ClientURL())
				if _, err := responder.QueueSubscribe(subject, service, func(m *nats.Msg) {
					var t rawTrade
					if err := f.unmarshal(m.Data, &t); err != nil {
						b.Error(err)
					}
					data, _ := f.marshal(&t)
					_ = m.Respond(data)
				}); err != nil {
					b.Fatal(err)
				}
				if _, err := responder.QueueSubscribe("bytes."+subject, service, func(m *nats.Msg) { _ = m.Respond(m.Data) }); err != nil {
					b.Fatal(err)
				}
				if err := responder.Flush(); err != nil {
					b.Fatal(err)
				}
				encoded, _ := f.codec.Marshal(trade)
				versus(b, callers, func() error {
					_, err := aegis.Call[benchTrade, benchTrade](context.Background(), client, service, "create_order", trade)
					return err
				}, func() error {
					data, err := f.marshal(rawTrade(trade))
					if err != nil {
						return err
					}
					m, err := requester.Request(subject, data, 5*time.Second)
					if err != nil {
						return err
					}
					var t rawTrade
					return f.unmarshal(m.Data, &t)
				}, func() error {
					_, err := requester.Request("bytes."+subject, encoded, 5*time.Second)
					return err
				})
				_ = svc.Stop(context.Background())
			})
		}
	}
}

// BenchmarkCodec encodes and decodes a struct of five fields. The baselines do the same with msgpack v5 as it comes, and with
// encoding/json. ns/op is the time of aegis; x-msgpack and x-json are that time divided by the time of the baseline. The type
// money has a MarshalJSON, so that MsgPack sends it as JSON.
func BenchmarkCodec(b *testing.B) {
	trade := benchTrade{"ACC-1234", "AAPL", 100, 187.25, true}
	raw := rawTrade(trade)
	paid := payment{"ACC-1234", "AAPL", 100, money{18725}, true}
	packed, _ := aegis.MsgPack.Marshal(&trade)
	text, _ := json.Marshal(&trade)
	paidText, _ := json.Marshal(&paid)
	check := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	encode := func(marshal func(any) ([]byte, error), v any) func() {
		return func() {
			_, err := marshal(v)
			check(err)
		}
	}
	decodeTrade := func(unmarshal func([]byte, any) error, data []byte) func() {
		return func() {
			var t benchTrade
			check(unmarshal(data, &t))
		}
	}
	decodeRaw := func() {
		var t rawTrade
		check(msgpack.Unmarshal(packed, &t))
	}
	decodePayment := func(unmarshal func([]byte, any) error) func() {
		return func() {
			var p payment
			check(unmarshal(paidText, &p))
		}
	}
	m, j := aegis.MsgPack, aegis.JSON
	for _, bench := range []struct {
		name                 string
		aegis, msgpack, json func() // msgpack is nil if it can't carry the value
	}{
		{"encode", encode(m.Marshal, &trade), encode(msgpack.Marshal, &raw), encode(json.Marshal, &trade)},
		{"decode", decodeTrade(m.Unmarshal, packed), decodeRaw, decodeTrade(json.Unmarshal, text)},
		{"encode/json", encode(j.Marshal, &trade), nil, encode(json.Marshal, &trade)},
		{"decode/json", decodeTrade(j.Unmarshal, text), nil, decodeTrade(json.Unmarshal, text)},
		{"encode/money", encode(m.Marshal, &paid), nil, encode(json.Marshal, &paid)},
		{"decode/money", decodePayment(m.Unmarshal), nil, decodePayment(json.Unmarshal)},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var times [3][]float64
			for n := 0; n < b.N || n == 0; n += 1000 { // alternating turns
				for i, run := range []func(){bench.aegis, bench.msgpack, bench.json} {
					if run == nil {
						continue
					}
					begin := time.Now()
					for range 1000 {
						run()
					}
					times[i] = append(times[i], float64(time.Since(begin))/1000)
				}
			}
			value := func(f float64) float64 { return f }
			own := median(times[0], value)
			b.ReportMetric(own, "ns/op")
			for i, unit := range []string{"x-msgpack", "x-json"} {
				if times[i+1] != nil {
					b.ReportMetric(own/median(times[i+1], value), unit)
				}
			}
		})
	}
}

// A payment is a trade whose price only encoding/json can express.
type payment struct {
	Account  string `json:"account"`
	Symbol   string `json:"symbol"`
	Quantity int64  `json:"quantity"`
	Price    money  `json:"price"`
	Buy      bool   `json:"buy"`
}

// money has unexported fields, and JSON as its only form on the wire.
type money struct{ cents int64 }

func (m money) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, `"%d.%02d"`, m.cents/100, m.cents%100), nil
}

func (m *money) UnmarshalJSON(data []byte) error {
	var units, cents int64
	if _, err := fmt.Sscanf(string(data), `"%d.%d"`, &units, &cents); err != nil {
		return err
	}
	m.cents = units*100 + cents
	return nil
}

// BenchmarkMetrics makes calls from 256 callers and reports, from a CPU profile, which share of all CPU time is spent on metrics:
// on the caller's side and on the handler's, including the readings of the clock. The baseline is the rest of the same calls.
func BenchmarkMetrics(b *testing.B) {
	srv := startServer(b)
	svc, client := newService(b, srv, "svc"), newService(b, srv, "client")
	handle(b, svc, "m", echo)
	start(b, svc)
	profile := filepath.Join(b.TempDir(), "cpu")
	f, err := os.Create(profile)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	load(b, 256, 5000, benchCall(client, "m")) // fills the pools
	if err := pprof.StartCPUProfile(f); err != nil {
		b.Skip(err) // go test -cpuprofile is taking a profile already
	}
	load(b, 256, max(b.N, 20000), benchCall(client, "m"))
	pprof.StopCPUProfile()
	out, err := exec.Command("go", "tool", "pprof", "-top", "-focus", `aegis\.\(\*(meter|lookup)`, profile).CombinedOutput()
	if err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	share := 0.0 // if the profile has no sample of the metrics
	if m := regexp.MustCompile(`accounting for .*, ([0-9.]+)% of .* total`).FindSubmatch(out); m != nil {
		share, _ = strconv.ParseFloat(string(m[1]), 64)
	}
	b.ReportMetric(share, "%cpu-for-metrics")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkBesideSlow calls a fast method while 64 callers keep a slow method (10 ms) of the same service busy. The baseline
// calls the same fast method while nobody calls the slow one.
func BenchmarkBesideSlow(b *testing.B) {
	srv := startServer(b)
	svc, client := newService(b, srv, "svc"), newService(b, srv, "client")
	handle(b, svc, "fast", echo)
	handle(b, svc, "slow", func(_ context.Context, s string) (string, error) {
		time.Sleep(10 * time.Millisecond)
		return s, nil
	})
	start(b, svc)
	var busy atomic.Bool
	var slow sync.WaitGroup
	for range 64 {
		slow.Go(func() {
			for b.Context().Err() == nil {
				if !busy.Load() {
					time.Sleep(time.Millisecond)
				} else if _, err := call[string, string](client, "svc", "slow", "x"); err != nil {
					b.Error(err)
				}
			}
		})
	}
	fast := func(slowBusy bool) func() error {
		return func() error {
			busy.Store(slowBusy)
			_, err := call[string, string](client, "svc", "fast", "x")
			return err
		}
	}
	versus(b, 1, fast(true), fast(false))
	b.Cleanup(slow.Wait)
}

// BenchmarkIdle measures how long Start takes, and the CPU time and the memory of a started service that nobody calls, without
// subscriptions and with 1,000. The service runs in a process of its own, which is this test's binary: nats-server is linked into
// it but does not run. The benchmark works only on Linux.
func BenchmarkIdle(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads /proc")
	}
	for _, subscriptions := range []int{0, 1000} {
		b.Run(fmt.Sprintf("subscriptions=%d", subscriptions), func(b *testing.B) {
			child := startProcess(b, "idle", startServer(b, withJetStream(b)), fmt.Sprintf("AEGIS_TEST_SUBSCRIPTIONS=%d", subscriptions))
			if line, _ := child.line(b); line != "ready" {
				b.Fatal(line)
			}
			took, _ := child.line(b)
			micros, _ := strconv.ParseFloat(took, 64)
			b.ReportMetric(micros/1000, "start-ms")
			child.reportUse(b, 8*time.Second)
			b.ReportMetric(0, "ns/op")
		})
	}
}

// reportUse reports the CPU time that the process uses from now on, and the memory that it has then. It reads /proc:
// https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
func (p *process) reportUse(b *testing.B, watched time.Duration) {
	b.Helper()
	if testing.Short() {
		watched = time.Second
	}
	ticks := func() float64 { // of 10 ms
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Process.Pid))
		if err != nil {
			b.Fatal(err)
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')'):]))
		user, _ := strconv.ParseFloat(fields[12], 64)
		system, _ := strconv.ParseFloat(fields[13], 64)
		return user + system
	}
	before := ticks()
	time.Sleep(watched)
	b.ReportMetric(100*(ticks()-before)*0.01/watched.Seconds(), "%core")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rss, _ := strings.Cut(string(status), "VmRSS:")
	kb, _ := strconv.ParseFloat(strings.Fields(rss)[0], 64)
	b.ReportMetric(kb/1024, "MB-RSS")
}

// BenchmarkRegistry reports what a process costs that watches a service of 2,000 instances, each of which sends a heartbeat every 10
// s, and what the entries of these instances cost the server.
func BenchmarkRegistry(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads /proc")
	}
	const n, interval = 2000, 10 * time.Second
	srv := startServer(b, withJetStream(b))
	start(b, newService(b, srv, "other")) // makes the bucket
	js := manage(b, srv)
	beat := func(i, round int) {
		name := fmt.Sprintf("svc-%08x", i)
		endpoint := aegis.Endpoint{Kind: "rpc", Name: "create_order", Subject: "rpc.svc.create_order"}
		entry := aegis.Instance{Service: "svc", ID: name, Version: "1.2.3", Status: "ACTIVE", Endpoints: []aegis.Endpoint{endpoint}, Load: round}
		data, err := json.Marshal(entry)
		if err == nil {
			_, err = js.PublishMsgAsync(&nats.Msg{Subject: "$KV.aegis_registry.svc." + name, Data: data, Header: nats.Header{"Nats-TTL": {"30"}}})
		}
		if err != nil {
			b.Error(err)
		}
	}
	before := memory()
	for i := range n {
		beat(i, 0)
	}
	<-js.PublishAsyncComplete()
	b.ReportMetric(float64(memory()-before)/n/1024, "server-KB/entry")
	child := startProcess(b, "watching", srv)
	for range 2 {
		if line, _ := child.line(b); line != "ready" && line != "watching 2000 <nil>" {
			b.Fatal(line)
		}
	}
	var beating sync.WaitGroup
	done := make(chan struct{})
	beating.Go(func() {
		for round := 1; ; round++ {
			for i := range n {
				select {
				case <-done:
					return
				case <-time.After(interval / n):
					beat(i, round)
				}
			}
		}
	})
	cpu := cpuTime()
	child.reportUse(b, 8*time.Second)
	b.ReportMetric(100*(cpuTime()-cpu).Seconds()/8, "%core-server")
	if len(child.lines) > 0 {
		b.Error("Watch yields a list after heartbeats")
	}
	close(done)
	beating.Wait()
	b.ReportMetric(0, "ns/op")
}

// memory returns the bytes of the process's heap and stacks that are in use.
func memory() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// reportLoad reports the CPU time that this process takes, server and services together, and the messages that the server receives
// and sends in each second.
func reportLoad(b *testing.B, srv *server.Server) {
	b.Helper()
	messages := func() int64 {
		v, err := srv.Varz(nil)
		if err != nil {
			b.Fatal(err)
		}
		return v.InMsgs + v.OutMsgs
	}
	const watched = 3 * time.Second
	cpu, before := cpuTime(), messages()
	time.Sleep(watched)
	b.ReportMetric(100*(cpuTime()-cpu).Seconds()/watched.Seconds(), "%core")
	b.ReportMetric(float64(messages()-before)/watched.Seconds(), "messages/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkInstances reports what idle instances and the server cost together, in one process. The instances have one connection
// each, and a heartbeat a second instead of every 10 s.
func BenchmarkInstances(b *testing.B) {
	const n = 100
	srv := startServer(b, withJetStream(b))
	start(b, newService(b, srv, "other")) // makes the bucket
	before := memory()
	for range n {
		s := newService(b, srv, "svc", aegis.WithPool(1), aegis.WithHeartbeat(time.Second))
		handle(b, s, "m", echo)
		start(b, s)
	}
	b.ReportMetric(float64(memory()-before)/n/1024, "KB/instance")
	reportLoad(b, srv)
}

// BenchmarkWatches reports what the local copies of 500 services cost an instance and the server together, in one process, while
// nothing changes.
func BenchmarkWatches(b *testing.B) {
	const n = 500
	srv := startServer(b, withJetStream(b))
	start(b, newService(b, srv, "other")) // makes the bucket
	client := newService(b, srv, "client")
	before := memory()
	for i := range n {
		instances(b, client, fmt.Sprint("svc", i))
	}
	b.ReportMetric(float64(memory()-before)/n/1024, "KB/copy")
	reportLoad(b, srv)
}

// BenchmarkElections reports what elections cost, for the instances and the server together, in one process.
func BenchmarkElections(b *testing.B) {
	for name, shape := range map[string]struct{ instances, groups int }{"30-standbys": {31, 1}, "200-groups": {1, 200}, "200-groups-of-2": {2, 200}} {
		b.Run(name, func(b *testing.B) {
			srv := startServer(b, withJetStream(b))
			ctx, cancel := context.WithCancel(context.Background())
			var leading atomic.Int32
			var campaigns sync.WaitGroup
			for range shape.instances {
				s := newService(b, srv, "svc", aegis.WithPool(1))
				for g := range shape.groups {
					campaigns.Go(func() {
						_ = s.Lead(ctx, fmt.Sprint("g", g), aegis.Balanced, func(ctx context.Context, _ uint64) error {
							leading.Add(1)
							<-ctx.Done()
							return nil
						})
					})
				}
			}
			eventually(b, "all groups are led", func() bool { return int(leading.Load()) == shape.groups })
			reportLoad(b, srv)
			cancel()
			campaigns.Wait()
		})
	}
}

// BenchmarkPublish compares Publish, which encodes, with the jetstream package's PublishMsg of the same bytes and headers.
func BenchmarkPublish(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	js := manage(b, srv)
	for _, publishers := range []int{1, 256} {
		b.Run(fmt.Sprintf("publishers=%d", publishers), func(b *testing.B) {
			svc := newService(b, srv, "shop", aegis.WithPool(1)) // one connection, like the baseline
			publish(b, svc, "order", "created", benchOrder{})
			versus(b, publishers, func() error {
				return aegis.Publish(context.Background(), svc, "order", "created", benchOrder{SKU: "AAPL", Qty: 100})
			}, func() error {
				_, err := js.PublishMsg(context.Background(), rawEvent("order"))
				return err
			})
		})
	}
}

// rawEvent returns the message that Publish sends for a benchOrder.
func rawEvent(domain string) *nats.Msg {
	data, _ := aegis.MsgPack.Marshal(benchOrder{SKU: "AAPL", Qty: 100})
	return &nats.Msg{Subject: "events." + domain + ".created", Data: data, Header: nats.Header{"Nats-Msg-Id": {rand.Text()}, "Aegis-Source": {"shop"}}}
}

// BenchmarkPublishBatch compares PublishBatch with the jetstream package's PublishMsgAsync of the same bytes and headers.
func BenchmarkPublishBatch(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	js := manage(b, srv)
	svc := newService(b, srv, "shop", aegis.WithPool(1))
	compare(b, func(n int) sample {
		batch := make([]benchOrder, n)
		for i := range batch {
			batch[i] = benchOrder{SKU: "AAPL", Qty: 100}
		}
		return measure(n, func() {
			if err := aegis.PublishBatch(context.Background(), svc, "order", "created", batch); err != nil {
				b.Fatal(err)
			}
		})
	}, func(n int) sample {
		return measure(n, func() {
			for range n {
				if _, err := js.PublishMsgAsync(rawEvent("order")); err != nil {
					b.Fatal(err)
				}
			}
			<-js.PublishAsyncComplete()
		})
	})
}

// BenchmarkSubscribe compares Subscribe, which decodes each event, with the jetstream package's Consume, whose callback
// acknowledges each message. Both handle the same number of events, which are stored beforehand. The rate is that from the first
// event to the last.
func BenchmarkSubscribe(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	js := manage(b, srv)
	publisher := newService(b, srv, "shop")
	turn := 0
	// publishAll stores n events and returns their domain.
	publishAll := func(n int) (domain string) {
		turn++
		domain = fmt.Sprint("turn", turn)
		if err := aegis.PublishBatch(context.Background(), publisher, domain, "created", make([]benchOrder, n)); err != nil {
			b.Fatal(err)
		}
		return domain
	}
	// consume measures the time from the first of n events to the last. Each handler that begin starts must call handledOne per
	// event.
	consume := func(n int, begin func(handledOne func())) sample {
		var handled atomic.Int64
		first, last := make(chan struct{}), make(chan struct{})
		begin(func() {
			switch handled.Add(1) {
			case 1:
				close(first)
			case int64(n):
				close(last)
			}
		})
		<-first
		return measure(n, func() {
			if n > 1 {
				<-last
			}
		})
	}
	const least = 5000 // fewer events would have arrived before the first of them is handled
	compare(b, func(n int) sample {
		n = max(n, least)
		domain := publishAll(n)
		svc := newService(b, srv, "risk", aegis.WithPool(1))
		defer func() { _ = svc.Stop(context.Background()) }()
		return consume(n, func(handledOne func()) {
			subscribe(b, svc, domain+".*", func(context.Context, aegis.Event[benchOrder]) error { handledOne(); return nil }, aegis.FromStart())
			start(b, svc)
		})
	}, func(n int) sample {
		n = max(n, least)
		domain := publishAll(n)
		c, err := js.CreateConsumer(context.Background(), "AEGIS_EVENTS", jetstream.ConsumerConfig{
			Durable: domain, FilterSubject: "events." + domain + ".*", AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: 1 << 16,
		})
		if err != nil {
			b.Fatal(err)
		}
		var consuming jetstream.ConsumeContext
		defer func() { consuming.Stop() }()
		return consume(n, func(handledOne func()) {
			if consuming, err = c.Consume(func(m jetstream.Msg) { _ = m.Ack(); handledOne() }); err != nil {
				b.Fatal(err)
			}
		})
	})
}

// BenchmarkPublishToHandler publishes an event, waits for its acknowledgement by the server and for its handler, and then
// publishes the next one.
func BenchmarkPublishToHandler(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	js := manage(b, srv)
	svc := newService(b, srv, "shop")
	handled := make(chan struct{}, 1)
	subscribe(b, svc, "order.*", func(context.Context, aegis.Event[benchOrder]) error { handled <- struct{}{}; return nil })
	start(b, svc)
	c, err := js.CreateConsumer(context.Background(), "AEGIS_EVENTS", jetstream.ConsumerConfig{
		Durable: "raw", FilterSubject: "events.raw.*", AckPolicy: jetstream.AckExplicitPolicy,
	})
	if err != nil {
		b.Fatal(err)
	}
	consuming, err := c.Consume(func(m jetstream.Msg) {
		_ = m.Ack()
		handled <- struct{}{}
	})
	if err != nil {
		b.Fatal(err)
	}
	defer consuming.Stop()
	versus(b, 1, func() error {
		err := aegis.Publish(context.Background(), svc, "order", "created", benchOrder{SKU: "AAPL", Qty: 100})
		<-handled
		return err
	}, func() error {
		_, err := js.PublishMsg(context.Background(), rawEvent("raw"))
		<-handled
		return err
	})
}

// BenchmarkCommand sends a command, whose handler reports its progress once, and waits for its result. The baseline does the
// reads and writes of a command one after the other with the jetstream package: it creates a key, publishes to a stream, reads
// the key and updates it three times. It has no worker, no queue, and nobody who follows the command.
func BenchmarkCommand(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	js := manage(b, srv)
	ctx := context.Background()
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "raw"})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "RAW", Subjects: []string{"raw"}}); err != nil {
		b.Fatal(err)
	}
	svc, client := newService(b, srv, "risk"), newService(b, srv, "shop")
	handleCommand(b, svc, "work", func(_ context.Context, c *aegis.Command[benchOrder]) (benchReceipt, error) {
		return benchReceipt{ID: c.Data.SKU}, c.Progress(50, "half")
	})
	start(b, svc)
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			versus(b, callers, func() error {
				j, err := aegis.SendCommand[benchOrder, benchReceipt](ctx, client, "risk", "work", benchOrder{SKU: "AAPL", Qty: 100})
				if err == nil {
					_, err = j.Wait(ctx)
				}
				return err
			}, func() error {
				key := rand.Text()
				revision, err := kv.Create(ctx, key, make([]byte, 100))
				if err == nil {
					_, err = js.Publish(ctx, "raw", make([]byte, 20))
				}
				if err == nil {
					_, err = kv.Get(ctx, key)
				}
				for range 3 {
					if err == nil {
						revision, err = kv.Update(ctx, key, make([]byte, 100), revision)
					}
				}
				return err
			})
		})
	}
}

// BenchmarkCommandsHeld has 1,000 commands run at the same time, b.N times. It reports the time until all of them run, and the
// memory that they take in one process together with the server and all callers that wait for them.
func BenchmarkCommandsHeld(b *testing.B) {
	const held = 1000
	srv := startServer(b, withJetStream(b))
	svc, client := newService(b, srv, "risk"), newService(b, srv, "shop")
	var running atomic.Int32
	release := make(chan struct{})
	handleCommand(b, svc, "work", func(_ context.Context, c *aegis.Command[int]) (int, error) {
		running.Add(1)
		<-release
		return c.Data, nil
	})
	start(b, svc)
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc+m.StackInuse) / (1 << 20)
	}
	var took time.Duration
	var grown float64
	for range b.N {
		running.Store(0)
		before, begin := heap(), time.Now()
		var waiting sync.WaitGroup
		for i := range held {
			waiting.Go(func() {
				j := send[int, int](b, client, "risk", "work", i)
				if r, err := j.Wait(context.Background()); r != i || err != nil {
					b.Errorf("the command returned %d, %v; want %d", r, err, i)
				}
			})
		}
		eventually(b, "all commands run", func() bool { return running.Load() == held })
		took += time.Since(begin)
		grown += heap() - before
		for range held {
			release <- struct{}{}
		}
		waiting.Wait()
	}
	b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms-until-all-run")
	b.ReportMetric(grown/float64(b.N), "MB")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkCommandsForLater schedules 10,000 commands, of which 1,000 are due at the same time. It reports the CPU time that service
// and server take while all wait, the memory that they have taken for them, and the time from when the 1,000 are due until the last
// of them has begun. Service and server share the process.
func BenchmarkCommandsForLater(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	svc, client := newService(b, srv, "risk"), newService(b, srv, "shop")
	var begun atomic.Int32
	handleCommand(b, svc, "work", func(context.Context, *aegis.Command[int]) (int, error) { return int(begun.Add(1)), nil })
	start(b, svc)
	before := memory()
	const all, soon, watched = 10_000, 1000, 3 * time.Second
	due := time.Now().Add(15 * time.Second)
	var next atomic.Int32
	var senders sync.WaitGroup
	for range 64 {
		senders.Go(func() {
			for i := int(next.Add(1)); i <= all; i = int(next.Add(1)) {
				at := due
				if i > soon {
					at = due.Add(time.Hour)
				}
				send[int, int](b, client, "risk", "work", i, aegis.At(at))
			}
		})
	}
	senders.Wait()
	b.ReportMetric(float64(memory()-before)/(1<<20), "MB")
	cpu := cpuTime()
	time.Sleep(watched)
	b.ReportMetric(100*(cpuTime()-cpu).Seconds()/watched.Seconds(), "%core-waiting")
	if time.Until(due) < 0 {
		b.Fatal("sending has taken too long")
	}
	eventually(b, "the commands have begun", func() bool { return begun.Load() == soon })
	b.ReportMetric(float64(time.Since(due).Milliseconds()), "ms-until-all-begun")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDiscover lists a service of 100 instances from the local copy, and reports how much longer that takes than copying the
// list. Ten heartbeats come in a second.
func BenchmarkDiscover(b *testing.B) {
	const instances = 100
	srv := startServer(b, withJetStream(b))
	for range instances {
		s := newService(b, srv, "svc", aegis.WithPool(1))
		handle(b, s, "m", echo)
		start(b, s)
	}
	client := newService(b, srv, "client")
	ctx := context.Background()
	list := func() []aegis.Instance {
		all, err := client.Discover(ctx, "svc")
		if err != nil {
			b.Fatal(err)
		}
		return all
	}
	eventually(b, "all instances are discovered", func() bool { return len(list()) == instances })
	all := list()
	var copied []aegis.Instance
	var excess []float64
	per := func(fn func()) time.Duration {
		const n = 2000
		begin := time.Now()
		for range n {
			fn()
		}
		return time.Since(begin) / n
	}
	for b.Loop() {
		discover := per(func() { copied = list() })
		copying := per(func() { copied = slices.Clone(all) })
		excess = append(excess, float64(discover-copying)/float64(time.Microsecond))
	}
	b.ReportMetric(median(excess, func(f float64) float64 { return f }), "µs-beyond-the-copy")
	b.ReportMetric(testing.AllocsPerRun(1000, func() { copied = list() }), "allocs/op")
	_ = copied
}

// BenchmarkBalancedCall compares a call with Balance, which addresses one of three instances, with a call that NATS delivers to
// one of them. The latter is the baseline.
func BenchmarkBalancedCall(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	for range 3 {
		s := newService(b, srv, "svc")
		handle(b, s, "m", echo)
		start(b, s)
	}
	client := newService(b, srv, "client")
	eventually(b, "all instances are discovered", func() bool { return len(instances(b, client, "svc")) == 3 })
	for _, callers := range []int{1, 256} {
		for name, strategy := range map[string]aegis.Strategy{"round-robin": aegis.RoundRobin, "random": aegis.Random, "least-loaded": aegis.LeastLoaded} {
			b.Run(fmt.Sprintf("callers=%d/%s", callers, name), func(b *testing.B) {
				versus(b, callers, benchCall(client, "m", aegis.Balance(strategy)), benchCall(client, "m"))
			})
		}
	}
}

// BenchmarkExclusiveCall compares a call of an exclusive handler with a call of a handler that is not exclusive. The latter is
// the baseline.
func BenchmarkExclusiveCall(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	svc, client := newService(b, srv, "svc", aegis.WithFailover(aegis.Aggressive)), newService(b, srv, "client")
	handle(b, svc, "m", echo)
	handle(b, svc, "exclusive", echo, aegis.Exclusive())
	start(b, svc)
	eventually(b, "the instance leads", svc.IsLeader)
	for _, callers := range []int{1, 256} {
		b.Run(fmt.Sprintf("callers=%d/plain", callers), func(b *testing.B) {
			versus(b, callers, benchCall(client, "exclusive"), benchCall(client, "m"))
		})
		b.Run(fmt.Sprintf("callers=%d/sticky", callers), func(b *testing.B) {
			versus(b, callers, benchCall(client, "exclusive", aegis.Sticky()), benchCall(client, "m"))
		})
	}
}

// benchCall returns a function that calls a method of svc once.
func benchCall(client *aegis.Service, method string, opts ...aegis.CallOption) func() error {
	return func() error {
		_, err := aegis.Call[string, string](context.Background(), client, "svc", method, "hello", opts...)
		return err
	}
}

// BenchmarkHandOver stops the leader gracefully, b.N times. It measures the time from then until the next leader has answered a
// call.
func BenchmarkHandOver(b *testing.B) {
	srv := startServer(b, withJetStream(b))
	client := newService(b, srv, "client")
	add := func() *aegis.Service {
		s := newService(b, srv, "svc", aegis.WithFailover(aegis.Aggressive))
		handle(b, s, "who", func(context.Context, string) (string, error) { return s.ID(), nil }, aegis.Exclusive())
		start(b, s)
		return s
	}
	leader := add()
	eventually(b, "the first instance leads", leader.IsLeader)
	var gaps []time.Duration
	for b.Loop() {
		b.StopTimer()
		next := add()
		eventually(b, "the next instance knows the leader", func() bool { id, err := next.Leader(context.Background()); return id == leader.ID() && err == nil })
		b.StartTimer()
		begin := time.Now()
		stopped := make(chan error, 1)
		go func() { stopped <- leader.Stop(context.Background()) }()
		for id := ""; id != next.ID(); {
			var err error
			if id, err = aegis.Call[string, string](context.Background(), client, "svc", "who", "", aegis.Sticky()); err != nil {
				b.Fatal(err)
			}
		}
		gaps = append(gaps, time.Since(begin))
		if err := <-stopped; err != nil {
			b.Fatal(err)
		}
		leader = next
	}
	slices.Sort(gaps)
	b.ReportMetric(float64(gaps[len(gaps)/2])/1e6, "p50-ms")
	b.ReportMetric(float64(gaps[len(gaps)*99/100])/1e6, "p99-ms")
}

// versus compares single operations, which the given number of callers make at the same time.
func versus(b *testing.B, callers int, ours func() error, baselines ...func() error) {
	b.Helper()
	var runs []func(n int) sample
	for _, fn := range append([]func() error{ours}, baselines...) {
		runs = append(runs, func(n int) sample { return load(b, callers, n, fn) })
	}
	compare(b, runs...)
}

// compare runs b.N operations of aegis, which is runs[0], and as many of each baseline, in alternating turns, so that all are
// exposed to the same noise. It reports the medians over the turns, in units that end in -raw for the first baseline and in -bytes
// for the second. x-raw and x-bytes are the medians of the turns' ratios of operations per second.
func compare(b *testing.B, runs ...func(n int) sample) {
	b.Helper()
	const turns = 12
	n := max(b.N/turns, 1)
	for _, run := range runs {
		run(min(n, 5000)) // fills the pools
	}
	samples := make([][]sample, len(runs))
	for turn := range turns {
		order := make([]sample, len(runs))
		for i := range runs { // rotates the order, because later runs have an advantage
			k := (i + turn) % len(runs)
			order[k] = runs[k](n)
		}
		for k, s := range order {
			samples[k] = append(samples[k], s)
		}
	}
	for k, name := range []string{"", "raw", "bytes"}[:len(runs)] {
		suffix := strings.TrimSuffix("-"+name, "-")
		b.ReportMetric(median(samples[k], func(s sample) float64 { return s.rate }), "req/s"+suffix)
		b.ReportMetric(median(samples[k], func(s sample) float64 { return s.allocs }), "allocs"+suffix)
		if samples[k][0].p50 > 0 {
			b.ReportMetric(median(samples[k], func(s sample) float64 { return s.p50 }), "p50-µs"+suffix)
			b.ReportMetric(median(samples[k], func(s sample) float64 { return s.p99 }), "p99-µs"+suffix)
		}
		if k > 0 {
			var ratios []float64
			for turn, s := range samples[k] {
				ratios = append(ratios, samples[0][turn].rate/s.rate)
			}
			b.ReportMetric(median(ratios, func(f float64) float64 { return f }), "x-"+name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

type sample struct{ rate, p50, p99, allocs float64 }

func median[T any](s []T, of func(T) float64) float64 {
	var v []float64
	for _, x := range s {
		v = append(v, of(x))
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// load makes at least n calls of fn, from the given number of concurrent callers, and measures them.
func load(b *testing.B, callers, n int, fn func() error) sample {
	latencies := make([][]time.Duration, callers)
	each := (n + callers - 1) / callers
	for i := range latencies {
		latencies[i] = make([]time.Duration, 0, each)
	}
	result := measure(each*callers, func() {
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				for range each {
					t := time.Now()
					if err := fn(); err != nil {
						b.Error(err)
						return
					}
					latencies[i] = append(latencies[i], time.Since(t))
				}
			})
		}
		wg.Wait()
	})
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		b.FailNow()
	}
	slices.Sort(all)
	micros := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	result.p50, result.p99 = micros(all[len(all)/2]), micros(all[len(all)*99/100])
	return result
}

// measure runs fn, which does n operations, and returns their rate and the number of allocations per operation.
func measure(n int, fn func()) sample {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	fn()
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	return sample{rate: float64(n) / took.Seconds(), allocs: float64(after.Mallocs-before.Mallocs) / float64(n)}
}

// cpuTime returns the user and system time that this process has taken.
func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // can't fail
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
